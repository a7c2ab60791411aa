"""Graphs of TensorFlow's own ops, for programs that cannot load our library."""

from __future__ import annotations

import contextlib
import contextvars
from typing import Iterator

_is_on = contextvars.ContextVar("sparse_attention.portable_graph", default=False)


def is_on() -> bool:
    """Whether what is called here and now must run without our library."""
    return _is_on.get()


@contextlib.contextmanager
def portable_graph() -> Iterator[None]:
    """Builds what is called inside from TensorFlow's own ops alone.

        with sa.portable_graph():
            model.export("model.tflite", format="litert")

    The graph runs wherever TensorFlow does: in TensorFlow Lite, in TensorFlow.js, and on
    a server that has not our library. It is slower and makes a tensor of the scores of
    all computed blocks. A graph that was made before stays as it is: trace a
    `tf.function` anew inside.

    It holds for the thread that opens it, and for `block_sparse_attention` and all
    that is made of it. `BlocksparseTransformer`'s three ops have no such form, and raise
    a NotImplementedError.

    >>> import sparse_attention as sa, tensorflow as tf
    >>> plan = sa.pattern_block_mask("all", 64, 4, 16)
    >>> attend = tf.function(lambda x: sa.block_sparse_attention(x, x, x, plan, 4))
    >>> with sa.portable_graph():
    ...     graph = attend.get_concrete_function(tf.TensorSpec([1, 64, 32])).graph
    >>> [op.type for op in graph.get_operations() if "BlockSparse" in op.type]
    []
    """
    token = _is_on.set(True)
    try:
        yield
    finally:
        _is_on.reset(token)
