"""The gradient of the compiled attention op, for tapes, graphs and saved graphs."""

import tensorflow as tf

from ..native import loader
from .signature import (
    ATTRIBUTES,
    LENGTH_ATTRIBUTES,
    RULE_ATTRIBUTES,
    SHARED_INPUTS,
)


@tf.RegisterGradient("BlockSparseAttention")
def _attention_gradient(op, do, dlse):
    """dq, dk, dv and that of a relative bias; nothing else has a gradient."""
    q, k, v, *rest = op.inputs
    shared, rule_inputs = rest[: len(SHARED_INPUTS)], rest[len(SHARED_INPUTS) :]
    o, lse = op.outputs
    do = tf.zeros_like(o) if do is None else do
    dlse = tf.zeros_like(lse) if dlse is None else dlse
    names = (*ATTRIBUTES, *RULE_ATTRIBUTES, *LENGTH_ATTRIBUTES)
    attributes = {name: op.get_attr(name) for name in names}
    *grads, drelative_bias = loader.attention_ops().block_sparse_attention_grad(
        *(q, k, v, o, lse, do, dlse), *shared, rule_inputs=rule_inputs, **attributes
    )
    grads += [None] * len(SHARED_INPUTS)
    for name in map(tf.compat.as_str, attributes["rule"]):
        grads.append(drelative_bias if name == "relative_bias" else None)
    return grads


@tf.RegisterGradient("BlockSparseAttentionGrad")
def _second_gradient(op, *_):
    raise NotImplementedError(
        "block_sparse_attention has a first derivative only, got a request for the "
        "second; attention_impl has both"
    )
