"""The pure-Python half of the real blocksparse, from its wheel, on a compiled module of
our choice."""

import contextlib
import importlib.util
import os
import sys
import types

import numpy as np
import tensorflow as tf


class OpModule:
    """In the place of blocksparse's compiled module: some ops, and None for others."""

    def __init__(self, ops=None):
        self._ops = ops

    def __getattr__(self, name):
        return getattr(self._ops, name, None)


def load(ops=None, registers_gradients=False):
    """blocksparse's module `transformer`.

    Args:
      ops: Compiled module that has the ops of its class; None: they cannot be called.
      registers_gradients: Whether the module may register its gradients, which can be
        done once in a process, and not where ours are.
    """
    package = importlib.util.find_spec("blocksparse")
    assert package, "pip install --no-deps blocksparse==1.13.1"
    utils = types.ModuleType("blocksparse.utils")
    utils._op_module = OpModule(ops)
    utils.scalar_constant = tf.cast
    stand_ins = {
        "tensorflow": tf.compat.v1,
        "blocksparse": types.ModuleType("blocksparse"),
        "blocksparse.utils": utils,
    }
    path = os.path.join(package.submodule_search_locations[0], "transformer.py")
    spec = importlib.util.spec_from_file_location("blocksparse.transformer", path)
    module = importlib.util.module_from_spec(spec)
    with _replaced(sys.modules, stand_ins), contextlib.ExitStack() as stack:
        if not registers_gradients:
            ops = sys.modules["tensorflow.python.framework.ops"]
            no_op = {"RegisterGradient": lambda name: lambda gradient: gradient}
            stack.enter_context(_replaced(vars(ops), no_op))
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _replaced(table, entries):
    saved = {key: table[key] for key in entries if key in table}
    table.update(entries)
    try:
        yield
    finally:
        for key in entries:
            del table[key]
        table.update(saved)


def save_graph(path):
    """Writes the GraphDef of a model that uses the original's class, as text.

    The original's code builds it, but on our ops; what they add to its own, the
    attribute XT, is taken out.
    """
    from google.protobuf import text_format

    from sparse_attention.native import loader

    module = load(loader.blocksparse_ops(), registers_gradients=True)
    layout = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1]])

    def causal(blk_shape, head_idx, query_blk_idx, key_blk_idx, blk_idx):
        return np.tril(
            np.ones(blk_shape, bool), 0 if query_blk_idx == key_blk_idx else 8
        )

    bst = module.BlocksparseTransformer(layout, 8, heads=2, mask_callback=causal)
    with tf.Graph().as_default() as graph:
        q, k, v, dy = (
            tf.compat.v1.placeholder(tf.float32, [None, 24, 16], name)
            for name in ("q", "k", "v", "dy")
        )
        w = bst.query_key_op(q, k)
        y = bst.weight_value_op(bst.masked_softmax(w, 0.25, autoregress_at_key=5), v)
        outputs = [y] + tf.gradients(y, [q, k, v], dy)
        for name, tensor in zip(("y", "dq", "dk", "dv"), outputs):
            tf.identity(tensor, name)
    graph_def = graph.as_graph_def()
    for node in graph_def.node:
        node.attr.pop("XT", None)
    with open(path, "w") as file:
        file.write(text_format.MessageToString(graph_def))


if __name__ == "__main__":
    save_graph(sys.argv[1])
