"""blocksparse's TensorFlow ops, which are loaded on first use, and their gradients.

A process can register an op only once. Where the real blocksparse is loaded, its ops and
gradients are used, and ours are not registered.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import tensorflow as tf

from ..native import loader
from ..ops import gradients  # noqa: F401 - registers them


def load_blocksparse_ops() -> Any:
    """The module with the ops. Until it is called, graphs that hold them do not load.

    Raises:
      RuntimeError: If there is no compiled library and none can be made.
    """
    real = getattr(sys.modules.get("blocksparse.utils"), "_op_module", None)
    return real or _load_ours()


def load_ops(blocksparse_ops: bool = False) -> None:
    """Loads the attention ops and their gradients, compiling them if need be.

    For programs that load a SavedModel or a GraphDef with our ops in it before they call
    anything here; everything else loads what it needs by itself.

    Args:
      blocksparse_ops: Whether to load the ops that carry blocksparse's names, too: graphs
        have them from `BlocksparseTransformer` and `backend="blocksparse_ops"`. They are
        a library of their own, which takes as long again to compile.

    Raises:
      RuntimeError: If the ops cannot be had here.
    """
    if loader.attention_ops() is None:
        raise RuntimeError(
            "the attention ops must be compiled to load a graph that holds them, and "
            f"cannot be: {loader.why_not('attention_ops')}"
        )
    if blocksparse_ops:
        load_blocksparse_ops()


@functools.lru_cache(maxsize=None)
def _load_ours():
    module = loader.blocksparse_ops()
    if module is None:
        raise RuntimeError(
            "blocksparse's ops must be compiled, which needs g++ (or $CXX) and "
            "SPARSE_ATTENTION_NO_JIT unset; `block_sparse_attention` works without. "
            f"What is in the way: {loader.why_not('blocksparse_ops')}"
        )
    for name, gradient in _GRADIENTS.items():
        try:
            tf.RegisterGradient(name)(gradient)
        except KeyError:  # blocksparse's transformer.py has registered its own
            pass
    return module


def _products(op, q_blocks, kv_blocks):
    """The products nt, nn and tn in the blocks of an op.

    Args:
      op: The op whose tables and attributes they share.
      q_blocks, kv_blocks: Names of the attributes that count its blocks.
    """
    ops, luts = load_blocksparse_ops(), op.inputs[2:]
    names = ("heads", "blocks", "blk_size", "nn_max", "tn_max", "bench")
    attrs = {name: op.get_attr(name) for name in names}
    q_blocks, kv_blocks = op.get_attr(q_blocks), op.get_attr(kv_blocks)

    def nt(q, kv, dtype):
        sizes = {"ctx_blks_a": q_blocks, "ctx_blks_b": kv_blocks}
        return ops.blocksparse_transformer_nt(q, kv, *luts, CT=dtype, **sizes, **attrs)

    def nn(w, kv):
        sizes = {"ctx_blks_b": kv_blocks, "ctx_blks_c": q_blocks}
        return ops.blocksparse_transformer_nn(w, kv, *luts, **sizes, **attrs)

    def tn(w, q):
        sizes = {"ctx_blks_b": q_blocks, "ctx_blks_c": kv_blocks}
        return ops.blocksparse_transformer_tn(w, q, *luts, **sizes, **attrs)

    return nt, nn, tn


def _nt_gradient(op, dw):
    """w = q k^T: dq = dw k, dk = dw^T q."""
    q, k = op.inputs[:2]
    _, nn, tn = _products(op, "ctx_blks_a", "ctx_blks_b")
    return nn(dw, k), tn(dw, q), None, None, None


def _nn_gradient(op, dy):
    """y = w v: dw = dy v^T, dv = w^T dy."""
    w, v = op.inputs[:2]
    nt, _, tn = _products(op, "ctx_blks_c", "ctx_blks_b")
    return nt(dy, v, w.dtype), tn(w, dy), None, None, None


def _tn_gradient(op, dy):
    """y = w^T v: dw = v dy^T, dv = w dy."""
    w, v = op.inputs[:2]
    nt, nn, _ = _products(op, "ctx_blks_b", "ctx_blks_c")
    return nt(v, dy, w.dtype), nn(w, dy), None, None, None


def _softmax_gradient(op, dy):
    """y = softmax(scale x): dx = scale y (dy - sum(y dy)), in the dtype of x.

    (blocksparse gives bfloat16 scores a float16 gradient if the weights are float16. That
    breaks any other op between the scores and the softmax.)
    """
    x, scale, lut = op.inputs[:3]
    attrs = {
        name: op.get_attr(name)
        for name in ("blocks", "blk_size", "ctx_blks", "lut_max")
    }
    dx = load_blocksparse_ops().blocksparse_softmax_grad(
        dy, op.outputs[0], scale, lut, **attrs
    )
    return [tf.cast(dx, x.dtype)] + [None] * (len(op.inputs) - 1)


_GRADIENTS = {
    "BlocksparseTransformerNT": _nt_gradient,
    "BlocksparseTransformerNN": _nn_gradient,
    "BlocksparseTransformerTN": _tn_gradient,
    "BlocksparseMaskedSoftmax": _softmax_gradient,
    "BlocksparseSoftmax": _softmax_gradient,
}
