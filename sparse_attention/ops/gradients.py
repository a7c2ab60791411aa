"""The gradient of the compiled attention op, for tapes, graphs and saved graphs."""

import tensorflow as tf

from ..native import loader
from .signature import ATTRIBUTES, SHARED_INPUTS


@tf.RegisterGradient("BlockSparseAttention")
def _attention_gradient(op, do, dlse):
    """dq, dk and dv; the lengths and the plan have no gradient."""
    q, k, v, *shared = op.inputs
    o, lse = op.outputs
    do = tf.zeros_like(o) if do is None else do
    dlse = tf.zeros_like(lse) if dlse is None else dlse
    attributes = {name: op.get_attr(name) for name in ATTRIBUTES}
    grads = loader.attention_ops().block_sparse_attention_grad(
        q, k, v, o, lse, do, dlse, *shared, **attributes
    )
    return [*grads, *[None] * len(SHARED_INPUTS)]


@tf.RegisterGradient("BlockSparseAttentionGrad")
def _second_gradient(op, *_):
    raise NotImplementedError(
        "block_sparse_attention has a first derivative only, got a request for the "
        "second; attention_impl has both"
    )
