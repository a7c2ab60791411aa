"""OpenAI's functions: dense and block-sparse attention, and their helpers."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import tensorflow as tf

from ..ops.attention import block_sparse_attention, not_converted, static_time
from ..ops.recompute import recomputable
from ..ops.signature import TensorLike
from ..plan.checks import check_positive
from ..plan.masks import NUM_VERTS, VERTSIZE, check_fixed
from ..plan.patterns import check_known, pattern_block_mask, resolve
from .transformer import get_blocksparse_obj

# The modes for which `get_attn_mask` and `get_callback` have rules of their own. They do not
# read the table of patterns, so that tests can hold one against the other.
OPENAIS_MODES = ("all", "local", "strided", "fixed")


@recomputable("attention_impl")
@not_converted
def attention_impl(
    q: TensorLike,
    k: TensorLike,
    v: TensorLike,
    heads: int,
    attn_mode: str,
    local_attn_ctx: int | None = None,
    blocksize: int = 32,
    num_verts: int | None = None,
    vertsize: int | None = None,
) -> tf.Tensor:
    """The dense masked reference: every score is computed, then masked.

    Args:
      q, k, v: [batch, time, heads * head_dim]; time may be unknown until the graph
        runs.
      heads: Number of heads.
      attn_mode, local_attn_ctx, blocksize, num_verts, vertsize: As for
        `get_attn_mask`.
      recompute: Whether to compute the activations again in the backward pass instead
        of keeping them.

    Returns:
      Like v.

    Raises:
      ValueError: If an argument is missing, not positive, or does not fit the others.

    Numerics: Products as TensorFlow multiplies matrices; scores and softmax in float32 if
      the input has 16 bits, the weights cast back.
    Cost: 4 * time^2 * head_dim FLOP per head; memory for several score matrices.
    """
    q, k, v = (split_heads(tf.convert_to_tensor(x), heads) for x in (q, k, v))
    mask = get_attn_mask(
        shape_list(k)[2],
        attn_mode,
        local_attn_ctx,
        heads,
        blocksize,
        num_verts,
        vertsize,
    )
    if q.dtype in (tf.float16, tf.bfloat16):
        q, k = tf.cast(q, tf.float32), tf.cast(k, tf.float32)
    w = tf.matmul(q, k, transpose_b=True) * shape_list(q)[-1] ** -0.5
    # A masked score is the least finite number, because enable_check_numerics stops at
    # -inf, and its weight is 0, even where no score is larger.
    w = tf.compat.v1.where_v2(mask > 0, w, w.dtype.min)
    w = tf.compat.v1.where_v2(mask > 0, tf.nn.softmax(w), 0.0)
    return merge_heads(tf.matmul(tf.cast(w, v.dtype), v))


@recomputable("blocksparse_attention_impl")
@not_converted
def blocksparse_attention_impl(
    q: TensorLike,
    k: TensorLike,
    v: TensorLike,
    heads: int,
    attn_mode: str,
    local_attn_ctx: int | None = None,
    blocksize: int = 32,
    num_verts: int | None = None,
    vertsize: int | None = None,
    backend: str = "fused",
) -> tf.Tensor:
    """`attention_impl` in the blocks that the pattern needs.

    Args:
      q, k, v: float32, float16 or bfloat16 [batch, time, heads * head_dim].
      heads: Number of heads.
      attn_mode, local_attn_ctx, num_verts, vertsize: As for `pattern_block_mask`, but
        num_verts is 4 where it is None.
      blocksize: Side of a block in positions: 8, 16, 32, 64 or, if "fused", 128.
      backend: "fused" runs `block_sparse_attention`. "blocksparse_ops" runs the three ops
        of OpenAI's code, which keep scores and weights in memory, 16 bits each.
        "blocksparse" does the same on the real package, where that imports.
      recompute: Whether to run the ops again in the backward pass instead of keeping
        their results.

    Returns:
      Like v.

    Raises:
      TypeError: If a dtype is not supported or not equal to q's.
      ValueError: If an argument is missing, not positive, or does not fit the others.
      ImportError: If `backend` is "blocksparse", and that package does not import.
    """
    q, k, v = (tf.convert_to_tensor(x, name=n) for n, x in zip("qkv", (q, k, v)))
    q_len = static_time("q", q)
    num_verts = NUM_VERTS if num_verts is None else num_verts
    sizes = (blocksize, local_attn_ctx, num_verts, vertsize)
    if backend == "fused":
        block_mask = pattern_block_mask(attn_mode, q_len, heads, *sizes)
        return block_sparse_attention(q, k, v, block_mask, heads)
    if backend not in ("blocksparse_ops", "blocksparse"):
        raise ValueError(
            "backend must be 'fused', 'blocksparse_ops' or 'blocksparse', "
            f"got {backend!r}"
        )
    is_real = backend == "blocksparse"
    bst = get_blocksparse_obj(
        q_len,
        heads,
        attn_mode,
        blocksize,
        local_attn_ctx,
        num_verts,
        vertsize,
        is_real,
    )
    pattern, settings = resolve(attn_mode, q_len, heads, *sizes)
    return _three_ops(bst, q, k, v, pattern.row_stride_of(settings))


def _three_ops(bst, q, k, v, row_stride):
    """Scores, softmax and weighted sum of blocksparse, on rows in the pattern's order."""
    n_ctx = static_time("q", q)
    if row_stride > 1:
        q, k, v = (strided_transpose(x, n_ctx, row_stride, 1) for x in (q, k, v))
    w = bst.query_key_op(q, k)
    w = bst.masked_softmax(w, scale=(shape_list(q)[-1] // bst.heads) ** -0.5)
    o = bst.weight_value_op(w, v)
    if row_stride > 1:  # and back
        o = strided_transpose(o, n_ctx, n_ctx // row_stride, 1)
    return o


def get_attn_mask(
    n: Any,
    attn_mode: str,
    local_attn_ctx: Any = None,
    heads: int | None = None,
    blocksize: int = 32,
    num_verts: int | None = None,
    vertsize: int | None = None,
) -> tf.Tensor:
    """Which keys each query attends to, written out for the dense reference: causal.

    Args:
      n: Sequence length in positions; an int or a scalar int32 tensor.
      attn_mode: "all" (everything so far), "local" (the last `local_attn_ctx`
        positions), "strided" (every `local_attn_ctx`-th so far) or "fixed" (its own window
        of `local_attn_ctx`, and a column of summary blocks in each earlier one). Other
        patterns of the table are unknown here.
      local_attn_ctx: Window or stride in positions; unused by "all".
      heads: Heads of "fixed"; None: `num_verts`.
      blocksize: Side of a block in positions, for "fixed".
      num_verts: Different summary columns among the heads of "fixed"; None: 4.
      vertsize: Blocks in a summary column of "fixed"; None: 1.

    Returns:
      float32 [1, heads if "fixed" else 1, n, n], 1 = attend.

    Raises:
      ValueError: If an argument is missing, not positive, or does not fit the others.
    """
    _check_mode(attn_mode, local_attn_ctx)
    positions = tf.range(n)
    i, j = positions[:, None], positions[None, :]
    attends = j <= i
    if attn_mode == "local":
        attends &= i - j < local_attn_ctx
    elif attn_mode == "strided":
        attends &= tf.equal((i - j) % local_attn_ctx, 0)
    elif attn_mode == "fixed":
        num_verts = NUM_VERTS if num_verts is None else num_verts
        vertsize = VERTSIZE if vertsize is None else vertsize
        heads = num_verts if heads is None else heads
        check_fixed(local_attn_ctx, blocksize, num_verts, vertsize)
        if heads % num_verts:
            raise ValueError(
                f"num_verts must divide heads={heads}, got {num_verts}; num_verts=1 gives "
                "all of them the same column"
            )
        # Summary columns count from the end of a window.
        column = (local_attn_ctx - 1 - j % local_attn_ctx) // (vertsize * blocksize)
        own_column = (tf.range(heads) % num_verts)[:, None, None]
        is_own_window = tf.equal(i // local_attn_ctx, j // local_attn_ctx)
        attends &= is_own_window | tf.equal(column, own_column)
    attends = tf.cast(attends, tf.float32)
    return tf.reshape(attends, [1, -1, n, n])


def get_callback(attn_mode: str, local_attn_ctx: int | None = None) -> Callable:
    """The `mask_callback` for blocksparse: what a pattern masks inside of its blocks.

    >>> get_callback("local", 3)((4, 4), 0, 1, 0, 0).astype(int)  # queries from 4 on
    array([[0, 0, 1, 1],
           [0, 0, 0, 1],
           [0, 0, 0, 0],
           [0, 0, 0, 0]])

    Args:
      attn_mode: "all", "local", "strided" (in transposed time) or "fixed".
      local_attn_ctx: The window of "local" in positions.

    Returns:
      `(blk_shape, head_idx, query_blk_idx, key_blk_idx, blk_idx)` -> bool [blk_shape],
      True = attend.

    Raises:
      ValueError: If the mode is unknown, or "local" has no window.
    """
    _check_mode(attn_mode, local_attn_ctx if attn_mode == "local" else 1)
    window = local_attn_ctx if attn_mode == "local" else None

    def mask_callback(blk_shape, head_idx, query_blk_idx, key_blk_idx, blk_idx):
        q_idx = query_blk_idx * blk_shape[0] + np.arange(blk_shape[0])[:, None]
        kv_idx = key_blk_idx * blk_shape[1] + np.arange(blk_shape[1])
        if window is not None:
            return (kv_idx <= q_idx) & (q_idx < kv_idx + window)
        return (kv_idx <= q_idx) | (query_blk_idx != key_blk_idx)

    return mask_callback


def _check_mode(attn_mode, local_attn_ctx):
    check_known(attn_mode, OPENAIS_MODES)
    if attn_mode != "all":
        check_positive(local_attn_ctx=local_attn_ctx)


def strided_transpose(
    x: TensorLike, n_ctx: int, local_attn_ctx: int, blocksize: int
) -> tf.Tensor:
    """Moves position a * local_attn_ctx + b to b * (n_ctx / local_attn_ctx) + a.

    Strided attention is then causal attention inside of chunks.
    `block_sparse_attention` addresses the rows in place instead.

    Args:
      x: [batch, n_ctx, width].
      n_ctx: Sequence length in positions.
      local_attn_ctx: The stride in positions; divides `n_ctx`.
      blocksize: Side of a block in positions; divides the chunks.

    Returns:
      Like x.

    Raises:
      ValueError: If a length is not a multiple of what divides it.
    """
    check_positive(n_ctx=n_ctx, local_attn_ctx=local_attn_ctx, blocksize=blocksize)
    if n_ctx % (local_attn_ctx * blocksize):
        raise ValueError(
            f"n_ctx must be a multiple of local_attn_ctx * blocksize = "
            f"{local_attn_ctx} * {blocksize}, got {n_ctx}"
        )
    batch, time, width = shape_list(x)
    x = tf.reshape(x, [batch, n_ctx // local_attn_ctx, local_attn_ctx, width])
    return tf.reshape(tf.transpose(x, [0, 2, 1, 3]), [batch, time, width])


def split_heads(x: TensorLike, n: Any) -> tf.Tensor:
    """[batch, time, n * dim] -> [batch, n, time, dim]"""
    return tf.transpose(split_states(x, n), [0, 2, 1, 3])


def merge_heads(x: TensorLike) -> tf.Tensor:
    """[batch, heads, time, dim] -> [batch, time, heads * dim]"""
    return merge_states(tf.transpose(x, [0, 2, 1, 3]))


def split_states(x: TensorLike, n: Any) -> tf.Tensor:
    """[..., n * dim] -> [..., n, dim]"""
    *outer, width = shape_list(x)
    check_positive(n=n)
    if isinstance(width, int) and width % n:
        raise ValueError(f"the last dimension must be a multiple of {n}, got {width}")
    return tf.reshape(x, [*outer, n, width // n])


def merge_states(x: TensorLike) -> tf.Tensor:
    """[..., n, dim] -> [..., n * dim]"""
    *outer, n, dim = shape_list(x)
    return tf.reshape(x, [*outer, n * dim])


def shape_list(x: TensorLike) -> list:
    """The shape of x: ints, and scalar tensors for what only the running graph knows."""
    dynamic = tf.shape(x)
    return [dynamic[i] if n is None else n for i, n in enumerate(x.shape.as_list())]
