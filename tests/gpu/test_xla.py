"""On a GPU, what XLA compiles gives the bits that the op gives without it.

python -m pytest tests/gpu/test_xla.py
"""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import sparse_attention as sa

pytestmark = pytest.mark.gpu
BATCH, TIME, HEADS, HEAD_DIM = 2, 512, 8, 64
DOCUMENTS = np.sort(np.random.RandomState(0).randint(0, 5, [BATCH, TIME]), axis=1)
RULES = {
    "softcap": {"logit_softcap": 2.0},
    "alibi": {"alibi_slopes": 0.5 ** np.arange(1.0, HEADS + 1)},
    "bias": {"relative_bias": np.random.RandomState(1).normal(size=[HEADS, 99])},
    "segments": {"segment_ids": DOCUMENTS.astype(np.int32)},
    "padding": {"mask": np.arange(TIME) % 5 > 0},
    "mask": {"mask": np.random.RandomState(2).rand(TIME, TIME) < 0.8},
    "dropout": {"dropout_rate": 0.2, "dropout_seed": [3, 4]},
}


def inputs(dtype, kv_heads=HEADS):
    random = np.random.RandomState(0)
    with tf.device("/GPU:0"):
        return [
            tf.cast(random.normal(size=[BATCH, TIME, heads * HEAD_DIM]), dtype)
            for heads in (HEADS, kv_heads, kv_heads, HEADS)
        ]


def attention_and_gradients(mode, kv_heads=HEADS, kv_lengths=None, **rule):
    block_mask = sa.pattern_block_mask(mode, TIME, HEADS, 32, 128)

    def call(q, k, v, do):
        with tf.device("/GPU:0"), tf.GradientTape() as tape:
            tape.watch([q, k, v])
            o, lse = sa.block_sparse_attention(
                *(q, k, v, block_mask, HEADS, kv_heads),
                kv_lengths=kv_lengths,
                return_lse=True,
                **rule,
            )
            finite = tf.where(tf.math.is_finite(lse), lse, 0.0)
            loss = tf.reduce_sum(tf.cast(o * do, tf.float32)) + tf.reduce_sum(finite)
        return [o, lse, *tape.gradient(loss, [q, k, v])]

    return call


def assert_compiled_equals(call, arguments):
    plain = tf.function(call)(*arguments)
    compiled = tf.function(call, jit_compile=True)
    for _ in range(3):
        for a, b in zip(compiled(*arguments), plain):
            assert "GPU" in a.device
            assert a.dtype == b.dtype
            assert a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["all", "local", "strided", "fixed"])
def test_compiled_equals_uncompiled(mode, dtype):
    assert_compiled_equals(attention_and_gradients(mode), inputs(dtype))


@pytest.mark.parametrize("allowed", [True, False])
def test_float32_follows_tensorflow_into_tf32(allowed):
    """When a graph is compiled; the op by itself, when it runs."""
    allow = tf.config.experimental.enable_tensor_float_32_execution
    allow(allowed)
    try:
        assert_compiled_equals(attention_and_gradients("fixed"), inputs("float32"))
    finally:
        allow(True)


def test_compiled_equals_uncompiled_for_groups_and_lengths():
    call = attention_and_gradients("all", kv_heads=2, kv_lengths=[100, 0])
    assert_compiled_equals(call, inputs("bfloat16", kv_heads=2))


@pytest.mark.parametrize("name", [*RULES, "all"])
def test_compiled_equals_uncompiled_under_rules(name):
    rule = RULES.get(name) or {k: x for rule in RULES.values() for k, x in rule.items()}
    call = attention_and_gradients("fixed", kv_heads=2, **rule)
    assert_compiled_equals(call, inputs("bfloat16", kv_heads=2))


def test_compiled_code_calls_our_kernels():
    call = tf.function(attention_and_gradients("fixed"), jit_compile=True)
    hlo = call.experimental_get_compiler_ir(*inputs("bfloat16"))("optimized_hlo")
    targets = set(re.findall(r'custom_call_target="(sparse_attention\w+)"', hlo))
    assert targets == {"sparse_attention_fwd", "sparse_attention_bwd"}


def model_of(layers=2):
    x = inputs_ = keras.Input([TIME, HEADS * HEAD_DIM])
    for _ in range(layers):
        y = keras.layers.LayerNormalization()(x)
        x = x + sa.SparseSelfAttention(HEADS, attn_mode="fixed", local_attn_ctx=128)(y)
        x = x + keras.layers.Dense(HEADS * HEAD_DIM, activation="gelu")(x)
    return keras.Model(inputs_, x)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_a_model_trains_compiled_by_itself(policy):
    x = np.random.RandomState(0).normal(size=[8, TIME, HEADS * HEAD_DIM])
    losses = []
    for jit_compile in (False, "auto"):
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy(policy)
        try:
            model = model_of()
        finally:
            keras.config.set_dtype_policy("float32")
        model.compile("adam", "mse", jit_compile=jit_compile)
        assert model.jit_compile == (jit_compile == "auto")
        history = model.fit(
            x, x * 0.5, batch_size=4, epochs=3, shuffle=False, verbose=0
        )
        losses.append(history.history["loss"])
        assert model.predict(x, verbose=0).shape == x.shape
    eps = 2.0**-10 if policy == "float32" else 2.0**-5  # float32 has TF32 products
    assert np.abs(np.subtract(*losses)).max() <= eps * losses[0][0]
    assert losses[1][-1] < losses[1][0]


def test_a_whole_step_compiles():
    model = model_of()
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    x = tf.random.stateless_normal([4, TIME, HEADS * HEAD_DIM], [1, 2])

    @tf.function(jit_compile=True)
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - x))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss

    losses = [float(step(x)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_many_threads_and_calls_give_the_same_bits():
    import concurrent.futures

    call = tf.function(attention_and_gradients("fixed"), jit_compile=True)
    arguments = inputs("bfloat16")
    want = [x.numpy().tobytes() for x in call(*arguments)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: call(*arguments), range(32)):
            assert [x.numpy().tobytes() for x in got] == want
