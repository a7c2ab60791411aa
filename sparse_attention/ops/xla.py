"""Loads what XLA needs to compile the op, before a graph with the op is compiled."""

import tensorflow as tf

from ..native import loader


def prepare():
    """Loads the library if the graph that is being made will be compiled by XLA.

    It takes most of a minute to compile, so it is not for those who use no XLA.

    Raises:
      RuntimeError: If the graph will be compiled by XLA and the library cannot be had.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)


def why_not():
    """str: why XLA cannot compile the op in the graph that is being made.

    None: It can, once this has loaded the library, or nothing here is for XLA.
    """
    is_compiled = _is_compiled(tf.compat.v1.get_default_graph())
    if not is_compiled or loader.attention_xla() is not None:
        return None
    return (
        "XLA cannot compile block_sparse_attention here, which works without "
        f"jit_compile=True: {loader.why_not('attention_xla')}"
    )


def _is_compiled(graph):
    """Whether a graph is made for `tf.function(jit_compile=True)`, at any depth.

    TensorFlow marks the graph around such a function while it traces it.
    """
    while graph is not None:
        find = getattr(graph, "_get_control_flow_context", None)
        context = find() if find else None
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False
