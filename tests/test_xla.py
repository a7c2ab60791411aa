"""The op and its gradient, compiled by XLA, give the bits that they give without it."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import DTYPES, PATTERNS
from keras_helpers import functional, normal
from rules import BATCH, Q_LEN, RULES
from tf_helpers import assert_same_bits, run_script

import sparse_attention as sa
from sparse_attention.native import libraries, loader
from sparse_attention.ops import xla

TIME, HEADS = 96, 4


def pattern(mode, block_size=8, heads=HEADS):
    return sa.pattern_block_mask(mode, TIME, heads, block_size, 32)


def inputs(dtype, head_dim=16, head_dim_v=24, kv_heads=HEADS, batch=2):
    random = np.random.RandomState(0)
    widths = HEADS * head_dim, kv_heads * head_dim, kv_heads * head_dim_v
    widths += (HEADS * head_dim_v,)
    return [tf.cast(random.normal(size=[batch, TIME, w]), dtype) for w in widths]


def attention_and_gradients(block_mask, kv_heads=HEADS, **options):
    def call(q, k, v, do, kv_lengths=None):
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            o, lse = sa.block_sparse_attention(
                *(q, k, v, block_mask, HEADS, kv_heads),
                kv_lengths=kv_lengths,
                return_lse=True,
                **options,
            )
            # dlse is not zero, but for rows that attend to nothing.
            finite = tf.where(tf.math.is_finite(lse), lse, 0.0)
            loss = tf.reduce_sum(tf.cast(o * do, tf.float32)) + tf.reduce_sum(finite)
        return [o, lse, *tape.gradient(loss, [q, k, v])]

    return call


def assert_compiled_equals(call, *arguments):
    plain = tf.function(call)(*arguments)
    compiled = tf.function(call, jit_compile=True)(*arguments)
    assert len(plain) == len(compiled) == 5
    for a, b in zip(compiled, plain):
        assert a.dtype == b.dtype
        assert_same_bits(a.numpy(), b.numpy())


# ---- bits ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", PATTERNS)
def test_compiled_equals_uncompiled(mode, dtype):
    assert_compiled_equals(attention_and_gradients(pattern(mode)), *inputs(dtype))


@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_compiled_equals_uncompiled_for_blocks_and_groups(block_size):
    call = attention_and_gradients(pattern("local", block_size), kv_heads=2)
    assert_compiled_equals(call, *inputs("float32", kv_heads=2))


@pytest.mark.parametrize("mode", ["all", "strided"])
def test_compiled_equals_uncompiled_with_lengths(mode):
    call = attention_and_gradients(pattern(mode), softmax_scale=0.3)
    lengths = tf.constant([17, 0])
    assert_compiled_equals(call, *inputs("bfloat16"), lengths)


@pytest.mark.parametrize("name", RULES)
def test_rules_compile_to_the_same_bits(name):
    """A rule's trained arrays get the bits of their gradients, too."""
    rule = dict(RULES[name])
    block_mask = sa.pattern_block_mask("fixed", Q_LEN, HEADS, 8, 16, num_verts=2)
    random = np.random.RandomState(0)
    x = tf.constant(random.normal(size=[BATCH, Q_LEN, HEADS * 16]), tf.float32)
    bias = tf.constant(rule.pop("relative_bias", np.zeros([1, 1])), tf.float32)

    def call(x, bias):
        if name == "relative_bias":
            rule["relative_bias"] = bias
        with tf.GradientTape() as tape:
            tape.watch([x, bias])
            options = dict(rule, return_lse=True)
            o, lse = sa.block_sparse_attention(x, x, x, block_mask, HEADS, **options)
            loss = tf.reduce_sum(o * x)
        gradients = tape.gradient(loss, [x, bias], unconnected_gradients="zero")
        return [o, lse, *gradients, x]

    assert_compiled_equals(call, x, bias)


def test_an_empty_batch_compiles():
    call = attention_and_gradients(pattern("local"))
    compiled = tf.function(call, jit_compile=True)(*inputs("float32", batch=0))
    assert [x.shape[0] for x in compiled] == [0] * 5


def test_compiled_code_calls_our_kernels_and_copies_nothing():
    attention = attention_and_gradients(pattern("all"))
    call = tf.function(lambda *xs: attention(*xs), jit_compile=True)
    hlo = call.experimental_get_compiler_ir(*inputs("bfloat16"))("optimized_hlo")
    targets = re.findall(r'custom_call_target="(\w+)"', hlo)
    assert targets == ["sparse_attention_fwd", "sparse_attention_bwd"]
    assert f"{HEADS},{TIME},{TIME}" not in hlo  # no tensor of scores


def test_calls_at_the_same_time_share_a_pool():
    block_mask = pattern("all")
    arguments = inputs("float32")

    @tf.function(jit_compile=True)
    def many(q, k, v):
        calls = [
            sa.block_sparse_attention(q * (i + 1.0), k, v, block_mask, HEADS)
            for i in range(8)
        ]
        return tf.stack(calls)

    q, k, v = arguments[:3]
    got = many(q, k, v)
    for i, o in enumerate(got):
        want = sa.block_sparse_attention(q * (i + 1.0), k, v, block_mask, HEADS)
        assert_same_bits(o.numpy(), want.numpy())


# ---- errors ----


def plan_of(block_mask):
    tiles = block_mask.tiles()
    arrays = [
        x if x.dtype == np.uint8 else x.view(np.uint8).reshape(*x.shape, 4)
        for x in tiles[2:]
    ]
    return tiles, [*arrays, *[np.zeros(0, np.uint8)] * 5]


@pytest.mark.parametrize("is_constant", [True, False])
@pytest.mark.parametrize(
    "which, change, message",
    [
        (0, lambda x: x[:-1], "kv_indptr must have shape"),
        (1, lambda x: x | 64, r"kv_indices\[0\] must be in"),
        (2, lambda x: x[1:], "mask_ids must have shape"),
        (2, lambda x: x * 0 + 100, r"mask_ids\[0\] must be in"),
    ],
)
def test_a_wrong_plan_is_an_error(which, change, message, is_constant):
    assert loader.attention_xla()
    tiles, plan = plan_of(pattern("all"))
    plan[which] = change(plan[which])
    op = loader.attention_ops().block_sparse_attention
    attributes = {"heads": HEADS, "kv_heads": HEADS, "softmax_scale": 1.0}
    attributes.update(row_stride=1, block_q=tiles.tile_q, block_kv=8, tile_kv=0)
    attributes["rule_inputs"] = []

    @tf.function(jit_compile=True)
    def call(q, k, v, *given):
        used = plan if is_constant else given
        return op(q, k, v, tf.zeros([0], tf.int32), *used, **attributes)

    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        call(*inputs("float32")[:3], *map(tf.constant, plan))


def test_wrong_lengths_are_an_error():
    call = tf.function(attention_and_gradients(pattern("all")), jit_compile=True)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"kv_lengths\[1\] must be"
    ):
        call(*inputs("float32"), tf.constant([1, TIME + 1]))


def test_without_the_library_compiling_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setattr(libraries, "XLA_HEADERS", ("xla/none.h",))
    assert "ships no xla/none.h" in libraries.why_no_compiling("attention_xla")
    assert libraries.why_no_compiling("attention_ops") is None
    why_not = loader.Loaded(None, "a test")
    monkeypatch.setitem(loader._loaded, "attention_xla", why_not)
    call = attention_and_gradients(pattern("all"))
    with pytest.raises(
        RuntimeError, match="cannot compile .* without jit_compile.*a test"
    ):
        tf.function(call, jit_compile=True)(*inputs("float32"))
    tf.function(call)(*inputs("float32"))


# ---- when the library is loaded ----


def test_only_graphs_for_xla_load_the_library(monkeypatch):
    asked = []
    monkeypatch.setattr(xla.loader, "attention_xla", lambda: asked.append(1) or True)
    call = attention_and_gradients(pattern("all"))
    xs = inputs("float32")
    call(*xs)
    tf.function(call)(*xs)
    assert not asked
    nested = tf.function(call)
    tf.function(lambda *xs: nested(*xs), jit_compile=True)(*xs)
    assert asked


LATE = """
import numpy as np
import tensorflow as tf
import sparse_attention as sa
assert tf.function(lambda x: x + 1, jit_compile=True)(1.0) == 2
plan = sa.pattern_block_mask("all", 64, 4, 16)
call = lambda x: sa.block_sparse_attention(x, x, x, plan, 4)
x = tf.reshape(tf.range(64.0 * 32) % 7, [1, 64, 32])
compiled = tf.function(call, jit_compile=True)
assert (compiled(x) == call(x)).numpy().all()
"""


def test_the_library_may_come_after_xla_has_been_used():
    run_script(LATE)


# ---- Keras ----


def compiled_model(policy, jit_compile):
    keras.utils.set_random_seed(0)
    layer = sa.SparseSelfAttention(
        4, attn_mode="local", local_attn_ctx=16, block_size=8, dtype=policy
    )
    model = functional(layer, 40, 32)
    model.compile("adam", "mse", jit_compile=jit_compile)
    assert model.jit_compile == jit_compile
    return model


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_a_model_trains_compiled(policy):
    x, y = normal(8, 40, 32), normal(8, 40, 32)
    results = []
    for jit_compile in (False, True):
        model = compiled_model(policy, jit_compile)
        losses = model.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0)
        results.append(losses.history["loss"])
        assert model.evaluate(x, y, verbose=0) < results[-1][0]
        assert model.predict(x, verbose=0).shape == (8, 40, 32)
        assert model.train_on_batch(x[:4], y[:4]) > 0
    # XLA fuses, so it rounds elsewhere: the policy's eps is what the losses may differ by.
    eps = 2.0**-7 if policy != "float32" else 2.0**-16
    assert np.abs(np.subtract(*results)).max() <= eps * results[0][0]
    assert results[1][-1] < results[1][0]


def masked_model():
    x = inputs_ = keras.Input([40, 32])
    x = keras.layers.Masking()(x)
    x = sa.SparseSelfAttention(4, attn_mode="local", local_attn_ctx=16, block_size=8)(x)
    return keras.Model(inputs_, x), "mse"


def language_model():
    sizes = {"vocab_size": 50, "time": 64, "layers": 2, "width": 32, "heads": 4}
    pattern = {"attention": "fixed,strided", "local_attn_ctx": 16, "block_size": 8}
    model = sa.SparseTransformer(**sizes, **pattern, recompute=True)
    return model, keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize("make", [masked_model, language_model])
def test_masks_recompute_and_accumulated_gradients_compile(make):
    if make is masked_model:
        x, y = normal(8, 40, 32), normal(8, 40, 32)
        for i, length in enumerate((40, 8, 1, 25) * 2):
            x[i, length:] = 0
    else:
        tokens = np.random.RandomState(0).randint(0, 50, [8, 65], np.int32)
        x, y = tokens[:, :-1], tokens[:, 1:]
    losses = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        model, loss = make()
        adam = keras.optimizers.Adam(1e-3, gradient_accumulation_steps=2)
        model.compile(adam, loss, jit_compile=jit_compile)
        assert model.jit_compile == jit_compile
        fitted = model.fit(x, y, batch_size=2, epochs=3, shuffle=False, verbose=0)
        losses.append(fitted.history["loss"])
    assert np.abs(np.subtract(*losses)).max() <= 2.0**-16 * losses[0][0]
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize("axes", [None, (8, 8)])
def test_a_models_step_scatters_nothing(axes):
    """XLA scatters row by row where it is told to be deterministic on a GPU."""
    sizes = {"vocab_size": 50, "time": 64, "layers": 1, "width": 32, "heads": 4}
    model = sa.SparseTransformer(**sizes, attention="all", position_axes=axes)
    model.build([None, 64])

    @tf.function(jit_compile=True)
    def gradients(tokens):
        with tf.GradientTape() as tape:
            logits = model(tokens)
            loss = keras.losses.sparse_categorical_crossentropy(tokens, logits, True)
        return tape.gradient(loss, [w.value for w in model.trainable_variables])

    hlo = gradients.experimental_get_compiler_ir(np.ones([2, 64], np.int32))("hlo")
    assert "dot(" in hlo and "sparse_attention_bwd" in hlo
    assert "scatter(" not in hlo


AUTO_JIT = """
import sys
sys.path.insert(0, "tests")
import tensorflow as tf
import test_xla

call = test_xla.attention_and_gradients(test_xla.pattern("fixed"))
arguments = test_xla.inputs("float32")
graph = tf.function(call)
for x in graph(*arguments):
    print(x.numpy().tobytes().hex())
"""


def test_clusters_that_tensorflow_forms_by_itself_give_the_same_bits():
    plain = run_script(AUTO_JIT)
    flags = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit --tf_xla_min_cluster_size=1"
    assert run_script(AUTO_JIT, TF_XLA_FLAGS=flags) == plain
