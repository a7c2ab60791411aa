"""The fused op: attention over the blocks that a plan lists."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import tensorflow as tf

from ..native import loader
from ..plan.block_mask import BlockMask
from ..plan.checks import check_positive
from . import (
    fallback,
    gradients,  # noqa: F401 - registers them
    portable,
    xla,
)
from .plan_tensors import plan_tensors
from .score_rule import NO_RULE, as_floats, score_rule
from .signature import ATTRIBUTES, LENGTH_ATTRIBUTES, TensorLike

DTYPES = (tf.float32, tf.float16, tf.bfloat16)
_DTYPES = frozenset(DTYPES)
MAX_HEAD_DIM = 256


# AutoGraph would find nothing to convert in our functions, in much that they call.
not_converted = tf.autograph.experimental.do_not_convert


# ---- block-sparse attention ----


def _allow_infinite_lse():
    """Tells `tf.debugging.enable_check_numerics` that lse may be -inf.

    The op gives it for rows that attend to nothing, whether or not it is asked for.
    TensorFlow lists such outputs of its own ops; without the list, there is nothing to do.
    """
    try:
        from tensorflow.python.debug.lib import check_numerics_callback as callback

        callback.IGNORE_OP_OUTPUTS += ((b"BlockSparseAttention", 1),)
    except (ImportError, AttributeError, TypeError):
        pass


_allow_infinite_lse()


@not_converted
def block_sparse_attention(
    q: TensorLike,
    k: TensorLike,
    v: TensorLike,
    block_mask: BlockMask,
    heads: int,
    kv_heads: int | None = None,
    softmax_scale: float | TensorLike | None = None,
    kv_lengths: TensorLike | None = None,
    return_lse: bool = False,
    name: str | None = None,
    *,
    segment_ids: TensorLike | tuple[TensorLike, TensorLike] | None = None,
    mask: TensorLike | None = None,
    logit_softcap: float | None = None,
    alibi_slopes: TensorLike | None = None,
    relative_bias: TensorLike | None = None,
    sinks: TensorLike | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: TensorLike | None = None,
    q_offset: int = 0,
) -> Any:
    """Attention over the blocks that a plan lists: scores are never a tensor.

        s_ij = softmax_scale * <q_i, k_j>     lse_i = log sum_j exp(s_ij)
        o_i  = sum_j exp(s_ij - lse_i) * v_j  (sums over the allowed j only)

    What models put between q kT and the softmax is the rest of the arguments, which
    are applied in the order in which the list below has them. i is the row of a query
    plus `q_offset`, j the row of a key.

    >>> import sparse_attention as sa
    >>> plan = sa.BlockMask(sa.all_layout(64, 16), sa.causal_mask(), block_size=16)
    >>> x = np.ones([2, 64, 4 * 8], np.float32)
    >>> sa.block_sparse_attention(x, x, x, plan, heads=4).shape.as_list()
    [2, 64, 32]

    Args:
      q: float32, float16 or bfloat16 [batch, q_len, heads * head_dim], tensor or
        array. head_dim is a multiple of 8, at most 256. The batch may be unknown until
        the graph runs, and so may the lengths where the plan's row_stride is 1.
      k: The same dtype [batch, kv_len, kv_heads * head_dim].
      v: The same dtype [batch, kv_len, kv_heads * head_dim_v].
      block_mask: `BlockMask` with one head or `heads`, for q_len and kv_len or, where
        its row_stride is 1, for longer ones: what it says of rows that the tensors do
        not have is without effect.
      heads: Number of query heads.
      kv_heads: Number of key heads, which divides `heads`: head h reads kv head
        floor(h / (heads / kv_heads)). None: `heads`.
      softmax_scale: Multiplies the scores: a number, or a floating-point tensor [] or
        [heads] that may be trained; None: 1 / sqrt(head_dim).
      kv_lengths: int32 [batch], from 0 to kv_len; keys at or past it do not exist.
        None: all do. The CPU refuses others; a GPU takes the nearest of these.
      return_lse: Whether to return lse as well.
      name: Name of the op.
      logit_softcap: Scores s become logit_softcap * tanh(s / logit_softcap).
      alibi_slopes: float [heads]; slope_h * abs(i - j) is taken from the scores.
      relative_bias: float [heads or 1, 2 R - 1]; the element at
        clip(i - j, 1 - R, R - 1) + R - 1 is added to the scores. It may be trained.
      segment_ids: int [batch, len], or a pair of them for q and for kv: a query attends
        to keys with its own id alone, and to none if that is negative.
      mask: bool, of a shape that NumPy would broadcast to
        [batch, heads, q_len, kv_len]; True = attend.
      sinks: float [heads], finite; a further score of each query, whose weight nothing
        is multiplied by. It may be trained.
      dropout_rate: In [0, 1): with this probability a weight becomes 0, otherwise it is
        divided by 1 - dropout_rate.
      dropout_seed: int [2], tensor or array. The weights that are dropped are a
        function of it, of the batch element, the head, i and j alone: the same on every
        device and in a recomputation. Needed where dropout_rate > 0.
      q_offset: int; kv_len - q_len has the last query at the last key.

    Returns:
      o: Like q, [batch, q_len, heads * head_dim_v]. With `return_lse` also
      lse: float32 [batch, heads, q_len], nats.
      A row that attends to nothing gives o = 0, lse = -inf, or its sink, and zero
      gradients.

    Raises:
      tf.errors.UnimplementedError: On a GPU, if a kernel cannot be compiled or needs
        more shared memory than there is, or has bfloat16 before compute capability 8.0.
      TypeError: If a dtype is not supported or not equal to q's, or `block_mask` is no
        `BlockMask`.
      ValueError: If a shape or a number of heads does not fit.

    Numerics: Products accumulate in float32, the softmax is float32. Bitwise
      deterministic, forward and backward. Masked keys cannot leak, NaN and Inf
      included. First derivatives only, of o and of lse.
    Cost: 2 * block_size^2 * (head_dim + head_dim_v) FLOP per computed block; beside
      inputs and outputs, memory for lse alone.
    """
    q, k, v = _as_tensor(q, "q"), _as_tensor(k, "k"), _as_tensor(v, "v")
    kv_heads = heads if kv_heads is None else kv_heads
    head_dims = _check_tensors(q, k, v, block_mask, heads, kv_heads)
    if softmax_scale is None:
        softmax_scale = head_dims[0] ** -0.5
    elif not isinstance(softmax_scale, numbers.Real):
        q, softmax_scale = _scaled(q, softmax_scale, heads), 1.0
    if kv_lengths is not None:
        kv_lengths = _as_lengths(kv_lengths, q)
    rule = NO_RULE
    optional = (segment_ids, mask, logit_softcap, alibi_slopes, relative_bias)
    if dropout_rate or q_offset or any(x is not None for x in optional):
        others = dropout_rate, dropout_seed, q_offset
        rule = score_rule(q, k, heads, *optional, *others)
    is_portable = portable.is_on()
    ops = None if is_portable else loader.attention_ops()
    if ops is None:
        o, lse = fallback.attention(
            *(q, k, v, block_mask, heads, kv_heads),
            softmax_scale=softmax_scale,
            kv_lengths=kv_lengths,
            rule=rule,
            return_lse=return_lse or sinks is not None,
            name=name,
            why_not=None if is_portable else loader.why_not("attention_ops"),
        )
    else:
        if not tf.executing_eagerly():
            xla.prepare()
        kv_lengths, plan = plan_tensors(
            ops, block_mask, q, kv_lengths, head_dims, heads // kv_heads
        )
        sizes = block_mask.row_stride, plan.tile_q, block_mask.block_size, plan.tile_kv
        attributes = dict(zip(ATTRIBUTES, (heads, kv_heads, softmax_scale, *sizes)))
        if rule is not NO_RULE:
            attributes.update(rule.attributes())
        lengths = block_mask.q_len, block_mask.kv_len
        if lengths != (q.shape[1], k.shape[1]):
            attributes.update(zip(LENGTH_ATTRIBUTES, lengths))
        o, lse = ops.block_sparse_attention(
            *(q, k, v, kv_lengths, *plan.inputs, list(rule.inputs.values())),
            **attributes,
            name=name,
        )
    if sinks is not None:
        o, lse = _with_sinks(o, lse, sinks, heads)
    return (o, lse) if return_lse else o


def _scaled(q, scale, heads):
    """q times a trained scale, which is the same as if the scores were."""
    scale = as_floats("softmax_scale", scale, None, "[] or [heads]")
    rank = scale.shape.rank
    if rank is None or scale.shape.as_list() not in ([], [heads], [None]):
        raise ValueError(
            f"softmax_scale must have shape [] or [heads={heads}], got {scale.shape}"
        )
    by_head = _by_head(q, heads) * (scale[:, None] if rank else scale)
    return tf.cast(_merged(by_head, q), q.dtype)


def _by_head(x, heads):
    """[batch, time, heads * dim] -> float32 [batch, time, heads, dim]"""
    shape = tf.shape(x)
    dim = x.shape.as_list()[2] // heads
    return tf.reshape(tf.cast(x, tf.float32), [shape[0], shape[1], heads, dim])


def _merged(by_head, x):
    """[batch, time, heads, dim] in the shape of x, as far as that is known."""
    merged = tf.reshape(by_head, tf.shape(x))
    merged.set_shape(x.shape)
    return merged


def _with_sinks(o, lse, sinks, heads):
    """o and lse with a score more in each query's softmax, whose weight is lost.

    The others' weights shrink by exp(lse - new lse), whatever computed them.
    """
    sinks = as_floats("sinks", sinks, [heads], "[heads]")[:, None]
    has_keys = tf.not_equal(lse, -np.inf)
    finite = tf.compat.v1.where_v2(has_keys, lse, 0.0)
    above = finite - sinks
    by_head = _by_head(o, heads) * tf.transpose(tf.sigmoid(above), [0, 2, 1])[..., None]
    o = tf.cast(_merged(by_head, o), o.dtype)
    lse = tf.compat.v1.where_v2(has_keys, finite + tf.nn.softplus(-above), sinks)
    return o, lse


def _as_tensor(x, name):
    """`tf.convert_to_tensor`, which takes its time with what is a tensor already."""
    return x if isinstance(x, tf.Tensor) else tf.convert_to_tensor(x, name=name)


def _check_tensors(q, k, v, block_mask, heads, kv_heads):
    """Raises unless shapes and dtypes fit; returns head_dim and head_dim_v."""
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask must be a BlockMask, got {type(block_mask).__name__}"
        )
    check_positive(heads=heads, kv_heads=kv_heads)
    if heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads={heads}, got {kv_heads}")
    if block_mask.heads not in (1, heads):
        raise ValueError(
            f"block_mask must have 1 head or heads={heads}, got {block_mask.heads}"
        )
    dtype = q.dtype
    batches, dims = [], []
    for name, tensor, tensor_heads, length_name in (
        ("q", q, heads, "q_len"),
        ("k", k, kv_heads, "kv_len"),
        ("v", v, kv_heads, "kv_len"),
    ):
        if tensor.dtype not in _DTYPES:
            names = ", ".join(dtype.name for dtype in DTYPES)
            raise TypeError(f"{name} must be one of {names}, got {tensor.dtype.name}")
        if tensor.dtype != dtype:
            raise TypeError(
                f"{name} must have q's dtype {dtype.name}, got {tensor.dtype.name}"
            )
        batch, time, width = _static_shape(name, tensor)
        _check_time(name, tensor, time, block_mask, length_name)
        dim, rest = (0, 0) if width is None else divmod(width, tensor_heads)
        if rest or dim % 8 or not 0 < dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have width = {tensor_heads} heads * a head dim that is a "
                f"multiple of 8 and at most {MAX_HEAD_DIM}, got shape {tensor.shape}"
            )
        if batch is not None:
            batches.append(batch)
        dims.append(dim)
    if len(set(batches)) > 1:
        raise ValueError(f"q, k and v must have the same batch, got {batches}")
    if not k.shape[1:2].is_compatible_with(v.shape[1:2]):
        raise ValueError(f"v must have k's time {k.shape[1]}, got shape {v.shape}")
    if dims[0] != dims[1]:
        raise ValueError(f"k must have q's head dim {dims[0]}, got {dims[1]}")
    return dims[0], dims[2]


def _check_time(name, tensor, time, block_mask, length_name):
    """Raises where a tensor is longer than its plan, or shorter and rows have a stride."""
    length = getattr(block_mask, length_name)
    if block_mask.row_stride > 1:
        if time is None:
            _refuse_unknown_time(name, tensor)
        if time != length:
            raise ValueError(
                f"{name} must have time = block_mask.{length_name} = {length}, as the plan's "
                f"row_stride is {block_mask.row_stride}, got shape {tensor.shape}"
            )
    elif time is not None and time > length:
        raise ValueError(
            f"{name} must have time <= block_mask.{length_name} = {length}, "
            f"got shape {tensor.shape}"
        )


def static_time(name, tensor):
    """The time of a tensor [batch, time, width]; ValueError where it is not known."""
    time = _static_shape(name, tensor)[1]
    return _refuse_unknown_time(name, tensor) if time is None else time


def _refuse_unknown_time(name, tensor):
    raise ValueError(
        f"{name} must have a time dimension that is known when the graph is built, "
        f"as this pattern's plan is made for one length, got shape {tensor.shape}; tell "
        f"it by {name}.set_shape([None, time, None])"
    )


def _static_shape(name, tensor):
    if tensor.shape.rank != 3:
        raise ValueError(
            f"{name} must have rank 3, [batch, time, heads * dim], "
            f"got shape {tensor.shape}"
        )
    return tensor.shape.as_list()


def _as_lengths(kv_lengths, q):
    """kv_lengths as an int32 tensor; raises unless its dtype and shape fit."""
    if not tf.is_tensor(kv_lengths):
        array = np.asarray(kv_lengths)
        if array.dtype.kind in "iu":
            kv_lengths = array.astype(np.int32)
    kv_lengths = tf.convert_to_tensor(kv_lengths, name="kv_lengths")
    if kv_lengths.dtype != tf.int32:
        raise TypeError(f"kv_lengths must be int32, got {kv_lengths.dtype.name}")
    if not kv_lengths.shape.is_compatible_with(q.shape[:1]):
        raise ValueError(
            f"kv_lengths must have shape [batch] = {q.shape[:1]}, "
            f"got {kv_lengths.shape}"
        )
    return kv_lengths
