"""What must work on every TensorFlow 2 that this package claims: `make test-versions`.

The file is collected only when it is named: pytest needs an environment for each version.
"""

import os
import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest
import tensorflow as tf

import sparse_attention as sa
from sparse_attention.native import loader
from sparse_attention.plan import reference

HEADS, HEAD_DIM, LENGTH = 4, 16, 72  # the last block is not whole
PATTERNS = ["all", "local", "strided", "fixed"]


def test_float32_follows_tensorflow_into_tf32():
    """On a GPU; the function that the op asks is there on any machine."""
    allows = loader.attention_ops().core.spattn_allows_tf32
    allow = tf.config.experimental.enable_tensor_float_32_execution
    assert allows() == 1  # TensorFlow's default
    allow(False)
    try:
        assert allows() == 0
    finally:
        allow(True)


def plan_of(pattern):
    window = None if pattern == "all" else 32
    return sa.pattern_block_mask(pattern, LENGTH, HEADS, 8, local_attn_ctx=window)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_op_and_gradient_match_the_oracle(pattern, dtype):
    block_mask = plan_of(pattern)
    arrays = np.random.RandomState(0).normal(size=(4, 2, LENGTH, HEADS, HEAD_DIM))
    rounded = [tf.cast(x, dtype) for x in arrays]
    oracle_inputs = [tf.cast(x, tf.float64).numpy() for x in rounded]
    q, k, v, do = (tf.reshape(x, [2, LENGTH, -1]) for x in rounded)
    with tf.GradientTape() as tape:
        tape.watch([q, k, v])
        o = sa.block_sparse_attention(q, k, v, block_mask, HEADS)
    got = [o, *tape.gradient(o, [q, k, v], do)]
    mask = block_mask.to_dense()
    want = [reference.attention_fwd(*oracle_inputs[:3], mask)[0]]
    want += reference.attention_bwd(*oracle_inputs[:3], mask, oracle_inputs[3])
    # The full tests have the tolerance of the plain implementation; this is a rough one.
    eps = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    for g, w in zip(got, want):
        error = np.abs(tf.cast(g, tf.float64).numpy().reshape(w.shape) - w).max()
        assert error <= 8 * eps * np.abs(w).max()


def test_the_compiled_op_ran():
    assert loader.why_not("attention_ops") is None
    graph = tf.function(
        lambda x: sa.block_sparse_attention(x, x, x, plan_of("local"), HEADS)
    ).get_concrete_function(tf.TensorSpec([2, LENGTH, HEADS * HEAD_DIM], tf.float32))
    types = [op.type for op in graph.graph.get_operations()]
    assert types.count("BlockSparseAttention") == 1


def test_three_ops_are_those_of_the_fused_op():
    x = np.random.RandomState(0).normal(size=[1, 64, HEADS * HEAD_DIM])
    x = x.astype(np.float32)
    results = [
        sa.blocksparse_attention_impl(
            *(x, x, x, HEADS, "local", 32), blocksize=8, backend=backend
        ).numpy()
        for backend in ("fused", "blocksparse_ops")
    ]
    assert np.abs(results[0] - results[1]).max() < 0.05  # their weights have 16 bits


def keras_model():
    from tensorflow import keras

    inputs = keras.Input([LENGTH, 32])
    layer = sa.SparseSelfAttention(
        heads=2, attn_mode="fixed", local_attn_ctx=16, block_size=8, num_verts=2
    )
    return keras.Model(inputs, layer(inputs))


def test_keras_layer_fits():
    model = keras_model()
    model.compile("adam", "mse")
    x = np.random.RandomState(0).normal(size=[4, LENGTH, 32]).astype(np.float32)
    losses = model.fit(x, -x, epochs=5, batch_size=2, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


LOAD_KERAS = """
import importlib, sys
for module in sys.argv[2:]:
    importlib.import_module(module)
import numpy as np
from tensorflow import keras

model = keras.models.load_model(sys.argv[1])
x = np.load(sys.argv[1] + ".npy")
np.save(sys.argv[1] + ".again.npy", model.predict(x, verbose=0))
"""


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize(
    "first, last", permutations(["sparse_attention", "tensorflow"])
)
def test_keras_loads_a_layer_that_is_not_named(first, last, suffix, tmp_path):
    model, path = keras_model(), str(tmp_path / "model") + suffix
    x = np.random.RandomState(0).normal(size=[2, LENGTH, 32]).astype(np.float32)
    here = model.predict(x, verbose=0)
    model.save(path)
    np.save(path + ".npy", x)
    subprocess.run([sys.executable, "-c", LOAD_KERAS, path, first, last], check=True)
    assert np.load(path + ".again.npy").tobytes() == here.tobytes()


def test_keras_layer_takes_masks_and_policies():
    x = np.random.RandomState(0).normal(size=[2, LENGTH, 32]).astype(np.float32)
    mask = np.arange(LENGTH) >= np.array([[0], [20]])
    layer = sa.SparseSelfAttention(2, block_size=8, dtype="mixed_float16")
    y = layer(x, mask=mask)
    assert y.dtype == tf.float16
    assert {str(tf.as_dtype(w.dtype).name) for w in layer.weights} == {"float32"}
    # Not a shorter x: TensorFlow's matrix products add in an order that depends on the shape.
    other_padding = layer(np.where(mask[..., None], x, 3 - x), mask=mask)
    same = np.array(y)[mask] == np.array(other_padding)[mask]
    assert same.all()


def test_keras_layer_takes_what_stands_before_the_softmax(tmp_path):
    from tensorflow import keras

    layer = sa.SparseSelfAttention(
        *(2, None, "local", 16, 8),
        dropout=0.3,
        alibi=True,
        logit_softcap=20.0,
        sinks=True,
        relative_positions=9,
        rotary=True,
    )
    inputs = keras.Input([LENGTH, 32]), keras.Input([LENGTH], dtype="int32")
    outputs = layer(inputs[0], mask=inputs[1] > 0, segment_ids=inputs[1])
    model = keras.Model(inputs, outputs)
    random = np.random.RandomState(0)
    x = random.normal(size=[4, LENGTH, 32]).astype(np.float32)
    ids = random.randint(0, 3, [4, LENGTH]).astype(np.int32)
    first, second = (layer(x, training=True).numpy() for _ in range(2))
    assert (first != second).any()
    before = layer.get_weights()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    losses = model.fit([x, ids], -x, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all((a != b).any() for a, b in zip(before, layer.get_weights()))
    path = str(tmp_path / "model.keras")
    model.save(path)
    loaded = keras.models.load_model(path)
    here, again = (m.predict([x, ids], verbose=0) for m in (model, loaded))
    assert here.tobytes() == again.tobytes()


def test_keras_own_layer_runs_by_the_fused_op_or_the_error_says_what_is_needed():
    from tensorflow import keras

    from sparse_attention.keras import backend, flash_attention

    version = tuple(map(int, backend.VERSION.split(".")[:2]))
    if version < (3, 10):
        with pytest.raises(ImportError, match="needs Keras 3.10"):
            sa.enable_flash_attention()
        for name in ("MultiHeadAttention", "GroupQueryAttention"):
            with pytest.raises(ImportError, match=f"^{name} needs Keras 3"):
                getattr(sa, name)(2, 16)
        return
    x = np.random.RandomState(0).normal(size=[2, LENGTH, 32]).astype(np.float32)
    theirs, ours = keras.layers.MultiHeadAttention(2, 16), sa.MultiHeadAttention(2, 16)
    plain, causal = theirs(x, x), theirs(x, x, use_causal_mask=True)
    ours.build(x.shape, x.shape)
    ours.set_weights(theirs.get_weights())
    before = flash_attention._calls["fused"]
    with sa.flash_attention():
        fused = theirs(x, x)
    assert flash_attention._calls["fused"] == before + 1
    assert np.abs(fused - plain).max() < 1e-5
    assert np.abs(ours(x, x, use_causal_mask=True) - causal).max() < 1e-5
    assert flash_attention._calls["fused"] == before + 2
    assert np.abs(theirs(x, x) - plain).max() == 0


LOAD = """
import sys
import numpy as np
import tensorflow as tf
import sparse_attention as sa

sa.load_ops()
function = tf.saved_model.load(sys.argv[1]).attention
x = np.load(sys.argv[1] + "/x.npy")
np.save(sys.argv[1] + "/again.npy", function(x).numpy())
"""


def test_saved_model_gives_the_same_bits_in_a_new_process(tmp_path):
    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, LENGTH, HEADS * HEAD_DIM])])
        def attention(self, x):
            return sa.block_sparse_attention(x, x, x, plan_of("fixed"), HEADS)

    module, folder = Module(), str(tmp_path / "saved")
    x = np.random.RandomState(0).normal(size=[2, LENGTH, HEADS * HEAD_DIM])
    x = x.astype(np.float32)
    here = module.attention(x).numpy()
    tf.saved_model.save(module, folder)
    np.save(os.path.join(folder, "x.npy"), x)
    subprocess.run([sys.executable, "-c", LOAD, folder], check=True)
    again = np.load(os.path.join(folder, "again.npy"))
    assert here.tobytes() == again.tobytes()


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_recomputable_gives_the_gradients_of_plain(mode, recwarn):
    w = tf.Variable(np.random.RandomState(0).normal(size=[32, 32]), dtype=tf.float32)
    calls = []

    @sa.recomputable("block")
    def block(x):
        calls.append(1)
        return tf.tanh(tf.matmul(x, w))

    def gradients(x, recompute):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = block(x, recompute=recompute)
        return tape.gradient(y, [x, w])

    run = tf.function(gradients) if mode == "function" else gradients
    x = tf.random.stateless_normal([8, 32], [1, 2])
    plain = run(x, False)
    plain_calls = len(calls)
    again = run(x, True)
    assert len(calls) - plain_calls > 1  # it ran once more for the gradient
    for a, b in zip(plain, again):
        assert np.array_equal(a.numpy(), b.numpy())
    assert not [w for w in recwarn if "saves no memory" in str(w.message)]
