"""Graphs with the op, saved and loaded in another process."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context
from tf_helpers import pattern, random_qkv, run_script, run_with_gradients

import sparse_attention as sa

IS_TF1 = tf.__version__.startswith("1.")

LOAD = """
import sys
import numpy as np
import tensorflow as tf
import sparse_attention

kind, folder = sys.argv[1:]
arrays = dict(np.load(folder + "/arrays.npz"))
want, q, k, v = (arrays[name] for name in ("want", "q", "k", "v"))
sparse_attention.load_ops()
if kind == "module":
    loaded = tf.saved_model.load(folder + "/model")
    q, k, v = map(tf.constant, (q, k, v))
    with tf.GradientTape() as tape:
        tape.watch([q, k, v])
        o = loaded.attention(q, k, v)
    got = [x.numpy() for x in [o, *tape.gradient(o, [q, k, v])]]
else:
    tf.compat.v1.disable_eager_execution()
    with tf.compat.v1.Session() as session:
        tf.compat.v1.saved_model.load(session, ["serve"], folder + "/model")
        tensors = [session.graph.get_tensor_by_name(n + ":0") for n in "oqkv"]
        grads = tf.gradients(tensors[0], tensors[1:])
        got = session.run([tensors[0], *grads], dict(zip(tensors[1:], (q, k, v))))
for g, name in zip(got, ("want", "dq", "dk", "dv")):
    assert g.tobytes() == arrays[name].tobytes(), name
print("same bits", len(got))
"""


@pytest.mark.parametrize("kind", ["graph"] if IS_TF1 else ["graph", "module"])
def test_saved_model_runs_in_a_new_process_with_gradients(kind, tmp_path):
    block_mask = pattern("fixed")
    q, k, v = random_qkv(block_mask, heads=4)
    model = str(tmp_path / "model")

    def attention(q, k, v):
        return sa.block_sparse_attention(q, k, v, block_mask, 4, name="o")

    (o,), grads = run_with_gradients(
        lambda *x: [attention(*x)], [q, k, v], [np.ones_like(q)]
    )
    names = ("q", "k", "v", "want", "dq", "dk", "dv")
    np.savez(str(tmp_path / "arrays.npz"), **dict(zip(names, [q, k, v, o, *grads])))
    if kind == "module":
        with context.eager_mode():
            module = tf.Module()
            spec = tf.TensorSpec([None, 72, 32])
            module.attention = tf.function(attention, input_signature=[spec] * 3)
            tf.saved_model.save(module, model)
    else:
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            inputs = {
                name: tf.compat.v1.placeholder(tf.float32, [None, 72, 32], name)
                for name in "qkv"
            }
            outputs = {"o": attention(**inputs)}
            tf.compat.v1.saved_model.simple_save(session, model, inputs, outputs)
    assert run_script(LOAD, kind, tmp_path) == "same bits 4\n"


LOAD_OPS = """
import sys
import sparse_attention as sa
from sparse_attention.native import loader
sa.load_ops(**{name: True for name in sys.argv[1:]})
print(sorted(loader._loaded))
"""


@pytest.mark.parametrize(
    "arguments, loaded",
    [
        ([], ["attention_ops"]),
        (["blocksparse_ops"], ["attention_ops", "blocksparse_ops"]),
    ],
)
def test_only_the_ops_that_are_asked_for_are_loaded(arguments, loaded):
    assert run_script(LOAD_OPS, *arguments) == f"{loaded}\n"
