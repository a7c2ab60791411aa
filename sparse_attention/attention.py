"""Attention on tensors: the fused op, the dense reference, the seed's helpers."""

import numbers
import weakref

import numpy as np
import tensorflow as tf

from . import (
    _cuda,
    _fallback,
    _gradients,  # noqa: F401 - registers them
    _ops,
)
from .block_mask import BlockMask, pattern_block_mask
from .blocksparse_ops import load_blocksparse_ops
from .masks import check_positive, fixed_mask
from .recompute import recomputable
from .tile_plans import KvTiles
from .transformer import get_blocksparse_obj

DTYPES = (tf.float32, tf.float16, tf.bfloat16)
MAX_HEAD_DIM = 256


# Not for AutoGraph: there is nothing to convert in them, and much that they call.
not_converted = tf.autograph.experimental.do_not_convert


# ---- block-sparse attention ----


@not_converted
def block_sparse_attention(
    q,
    k,
    v,
    block_mask,
    heads,
    kv_heads=None,
    softmax_scale=None,
    kv_lengths=None,
    return_lse=False,
    name=None,
):
    """Attention over the blocks that a plan lists: scores are never a tensor.

        s_ij = softmax_scale * <q_i, k_j>     lse_i = log sum_j exp(s_ij)
        o_i  = sum_j exp(s_ij - lse_i) * v_j  (sums over the allowed j only)

    >>> import sparse_attention as sa
    >>> plan = sa.BlockMask(sa.all_layout(64, 16), sa.causal_mask(), block_size=16)
    >>> x = np.ones([2, 64, 4 * 8], np.float32)
    >>> sa.block_sparse_attention(x, x, x, plan, heads=4).shape.as_list()
    [2, 64, 32]

    Args:
      q: float32, float16 or bfloat16 [batch, q_len, heads * head_dim], tensor or
        array. Only the batch may be unknown until the graph runs. head_dim is a
        multiple of 8, at most 256.
      k: The same dtype [batch, kv_len, kv_heads * head_dim].
      v: The same dtype [batch, kv_len, kv_heads * head_dim_v].
      block_mask: `BlockMask` for q_len and kv_len, with one head or `heads`.
      heads: Number of query heads.
      kv_heads: Number of key heads, which divides `heads`: head h reads kv head
        floor(h / (heads / kv_heads)). None: `heads`.
      softmax_scale: Multiplies the scores; None: 1 / sqrt(head_dim).
      kv_lengths: int32 [batch], from 0 to kv_len; keys at or past it do not exist.
        None: all do. Others are an error on the CPU, the nearest of these on a GPU.
      return_lse: Whether to return lse as well.
      name: Name of the op.

    Returns:
      o: Like q, [batch, q_len, heads * head_dim_v]. With `return_lse` also
      lse: float32 [batch, heads, q_len], nats.
      A row that attends to nothing gives o = 0, lse = -inf and zero gradients.

    Raises:
      TypeError: If a dtype is not supported or not equal to q's, or `block_mask` is no
        `BlockMask`.
      ValueError: If a shape or a number of heads does not fit.

    Numerics: Products accumulate in float32, the softmax is float32. Bitwise
      deterministic, forward and backward. Masked keys cannot leak, NaN and Inf
      included. First derivatives only, of o and of lse.
    Cost: 2 * block_size^2 * (head_dim + head_dim_v) FLOP per computed block; beside
      inputs and outputs, memory for lse alone.
    """
    q, k, v = (tf.convert_to_tensor(x, name=n) for n, x in zip("qkv", (q, k, v)))
    kv_heads = heads if kv_heads is None else kv_heads
    head_dims = _check_tensors(q, k, v, block_mask, heads, kv_heads)
    if softmax_scale is None:
        softmax_scale = head_dims[0] ** -0.5
    if not isinstance(softmax_scale, numbers.Real):
        raise TypeError(f"softmax_scale must be a number, got {softmax_scale!r}")
    kv_lengths = _as_lengths(kv_lengths, q)
    ops = _ops.attention_ops()
    if ops is None:
        o, lse = _fallback.attention(
            q, k, v, block_mask, heads, kv_heads, softmax_scale, kv_lengths, name
        )
    else:
        no_lengths = np.zeros([0], np.int32)
        block_q, tile_kv, plan = _plan_tensors(
            ops, block_mask, q, head_dims, heads // kv_heads
        )
        o, lse = ops.block_sparse_attention(
            q,
            k,
            v,
            no_lengths if kv_lengths is None else kv_lengths,
            *plan,
            heads=heads,
            kv_heads=kv_heads,
            softmax_scale=softmax_scale,
            row_stride=block_mask.row_stride,
            block_q=block_q,
            block_kv=block_mask.block_size,
            tile_kv=tile_kv,
            name=name,
        )
    return (o, lse) if return_lse else o


def load_ops():
    """Loads all ops and their gradients, compiling them if need be.

    For programs that load a SavedModel or a GraphDef with our ops, or blocksparse's, in it
    before they call anything here; everything else loads what it needs by itself.

    Raises:
      RuntimeError: If the ops cannot be had here.
    """
    if _ops.attention_ops() is None:
        raise RuntimeError(
            "the attention ops must be compiled to load a graph that holds them, and "
            "cannot be; `python -m sparse_attention.doctor` says why"
        )
    load_blocksparse_ops()


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
    batches, dims = [], []
    for name, tensor, tensor_heads, length_name in (
        ("q", q, heads, "q_len"),
        ("k", k, kv_heads, "kv_len"),
        ("v", v, kv_heads, "kv_len"),
    ):
        if tensor.dtype not in DTYPES:
            names = ", ".join(dtype.name for dtype in DTYPES)
            raise TypeError(f"{name} must be one of {names}, got {tensor.dtype.name}")
        if tensor.dtype != q.dtype:
            raise TypeError(
                f"{name} must have q's dtype {q.dtype.name}, got {tensor.dtype.name}"
            )
        length = getattr(block_mask, length_name)
        if _static_time(name, tensor) != length:
            raise ValueError(
                f"{name} must have time = block_mask.{length_name} = {length}, "
                f"got shape {tensor.shape}"
            )
        batch, _, width = tensor.shape.as_list()
        dim, rest = (0, 0) if width is None else divmod(width, tensor_heads)
        if rest or dim % 8 or not 0 < dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have width = {tensor_heads} heads * a head dim that is a "
                f"multiple of 8 and at most {MAX_HEAD_DIM}, got shape {tensor.shape}"
            )
        batches += [] if batch is None else [batch]
        dims.append(dim)
    if len(set(batches)) > 1:
        raise ValueError(f"q, k and v must have the same batch, got {batches}")
    if dims[0] != dims[1]:
        raise ValueError(f"k must have q's head dim {dims[0]}, got {dims[1]}")
    return dims[0], dims[2]


def _static_time(name, tensor):
    shape = tensor.shape
    if shape.rank != 3:
        raise ValueError(
            f"{name} must have rank 3, [batch, time, heads * dim], got shape {shape}"
        )
    if shape.as_list()[1] is None:
        raise ValueError(
            f"{name} must have a time dimension that is known when the graph is built, "
            f"as a plan is made for one length, got shape {shape}"
        )
    return shape.as_list()[1]


def _as_lengths(kv_lengths, q):
    if kv_lengths is None:
        return None
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


# ---- plans as tensors ----

_eager_plans = weakref.WeakKeyDictionary()


def _plan_tensors(ops, block_mask, q, head_dims, group):
    """block_q, tile_kv, and the op's nine plan inputs: made once for a device or a graph.

    In a graph they are constants, so that a saved one holds them. Tiles are as suits the
    GPUs that TensorFlow sees; where there are none the plan by keys is empty.
    """
    if tf.executing_eagerly():
        plans, owner, device = _eager_plans.setdefault(block_mask, {}), None, q.device
    else:
        graph = tf.compat.v1.get_default_graph()
        if not hasattr(graph, "_sparse_attention_plans"):
            graph._sparse_attention_plans = {}
        plans, owner, device = graph._sparse_attention_plans, block_mask, ""
    key = owner, device, q.dtype, head_dims, group
    if key not in plans:
        archs = {arch for _, arch in _cuda.devices()}
        if archs and tf.config.experimental.get_visible_devices("GPU"):
            tiles, kv_tiles = _cuda.plans(
                ops.core, archs, q.dtype.name, head_dims, block_mask, group
            )
        else:
            tiles, kv_tiles = block_mask.tiles(), _NO_KV_TILES
        # Outside of loops and branches: another call may be somewhere else.
        with tf.control_dependencies(None), tf.name_scope("block_mask"):
            with tf.device(device):
                tensors = [
                    tf.constant(_as_bytes(array))
                    for array in (*tiles[2:], *kv_tiles[2:])
                ]
        plans[key] = tiles.block_q, kv_tiles.tile_kv, tensors
    return plans[key]


_NONE = np.zeros(0, np.int32)
_NO_KV_TILES = KvTiles(0, 0, _NONE, _NONE, _NONE, _NONE, np.zeros(0, np.uint8))


def _as_bytes(array):
    """uint8 [..., 4] of int32, as TensorFlow would keep that in host memory."""
    if array.dtype == np.uint8:
        return array
    return array.view(np.uint8).reshape(*array.shape, 4)


# ---- the seed's functions ----


@recomputable("attention_impl")
@not_converted
def attention_impl(
    q,
    k,
    v,
    heads,
    attn_mode,
    local_attn_ctx=None,
    blocksize=32,
    num_verts=None,
    vertsize=None,
):
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

    Numerics: Products as TensorFlow multiplies matrices in this dtype; the softmax in
      float32 if the input has 16 bits, the weights cast back.
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
    w = tf.matmul(q, k, transpose_b=True)
    if w.dtype in (tf.float16, tf.bfloat16):
        w = tf.cast(w, tf.float32)
    w = w * shape_list(q)[-1] ** -0.5
    w = tf.compat.v1.where_v2(mask > 0, w, -1e9)
    w = tf.cast(tf.nn.softmax(w), v.dtype)
    return merge_heads(tf.matmul(w, v))


@recomputable("blocksparse_attention_impl")
@not_converted
def blocksparse_attention_impl(
    q,
    k,
    v,
    heads,
    attn_mode,
    local_attn_ctx=None,
    blocksize=32,
    num_verts=None,
    vertsize=None,
    backend="fused",
):
    """`attention_impl` in the blocks that the pattern needs.

    Args:
      q, k, v: float32, float16 or bfloat16 [batch, time, heads * head_dim].
      heads: Number of heads.
      attn_mode, local_attn_ctx, num_verts, vertsize: As for `get_attn_mask`.
      blocksize: Side of a block in positions: 8, 16, 32, 64 or 128.
      backend: "fused": `block_sparse_attention`. "blocksparse_ops": the seed's data path,
        three ops with scores and weights in memory, 16 bits each. "blocksparse": the same
        on the real package, where it imports.
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
    pattern = (attn_mode, blocksize, local_attn_ctx, num_verts, vertsize)
    if backend == "fused":
        attn_mode, *rest = pattern
        q_len = _static_time("q", q)
        block_mask = pattern_block_mask(attn_mode, q_len, heads, *rest)
        return block_sparse_attention(q, k, v, block_mask, heads)
    if backend not in ("blocksparse_ops", "blocksparse"):
        raise ValueError(
            "backend must be 'fused', 'blocksparse_ops' or 'blocksparse', "
            f"got {backend!r}"
        )
    return _three_ops(q, k, v, heads, pattern, backend == "blocksparse")


def _three_ops(q, k, v, heads, pattern, real):
    """Scores, softmax and weighted sum of blocksparse; strided by way of transposes."""
    attn_mode, blocksize, stride, num_verts, vertsize = pattern
    n_ctx = _static_time("q", q)
    bst = get_blocksparse_obj(
        n_ctx, heads, attn_mode, blocksize, stride, num_verts, vertsize, real
    )
    if attn_mode == "strided":
        q, k, v = (strided_transpose(x, n_ctx, stride, blocksize) for x in (q, k, v))
    w = bst.query_key_op(q, k)
    w = bst.masked_softmax(w, scale=(shape_list(q)[-1] // heads) ** -0.5)
    o = bst.weight_value_op(w, v)
    if attn_mode == "strided":  # and back
        o = strided_transpose(o, n_ctx, n_ctx // stride, 1)
    return o


def get_attn_mask(
    n,
    attn_mode,
    local_attn_ctx=None,
    heads=None,
    blocksize=32,
    num_verts=None,
    vertsize=None,
):
    """Which keys each query attends to, as the dense reference multiplies it in.

    Args:
      n: Sequence length in positions; an int or a scalar int32 tensor.
      attn_mode: "all" (everything so far), "local" (the last `local_attn_ctx`
        positions), "strided" (every `local_attn_ctx`-th) or "fixed" (the own window of
        `local_attn_ctx`, and in all earlier ones a column of summary blocks).
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
        num_verts = 4 if num_verts is None else num_verts
        vertsize = 1 if vertsize is None else vertsize
        heads = num_verts if heads is None else heads
        fixed_mask(local_attn_ctx, blocksize, num_verts, vertsize)  # checks them
        if heads % num_verts:
            raise ValueError(f"num_verts must divide heads={heads}, got {num_verts}")
        # Summary columns count from the end of a window.
        column = (local_attn_ctx - 1 - j % local_attn_ctx) // (vertsize * blocksize)
        own_column = (tf.range(heads) % num_verts)[:, None, None]
        is_own_window = tf.equal(i // local_attn_ctx, j // local_attn_ctx)
        attends &= is_own_window | tf.equal(column, own_column)
    attends = tf.cast(attends, tf.float32)
    return tf.reshape(attends, [1, -1, n, n])


def get_callback(attn_mode, local_attn_ctx=None):
    """blocksparse's `mask_callback` of a pattern: what is masked inside of its blocks.

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
    if attn_mode not in ("all", "local", "strided", "fixed"):
        raise ValueError(
            f"attn_mode must be 'all', 'local', 'strided' or 'fixed', got {attn_mode!r}"
        )
    if attn_mode != "all":
        check_positive(local_attn_ctx=local_attn_ctx)


def strided_transpose(x, n_ctx, local_attn_ctx, blocksize):
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


def split_heads(x, n):
    """[batch, time, n * dim] -> [batch, n, time, dim]"""
    return tf.transpose(split_states(x, n), [0, 2, 1, 3])


def merge_heads(x):
    """[batch, heads, time, dim] -> [batch, time, heads * dim]"""
    return merge_states(tf.transpose(x, [0, 2, 1, 3]))


def split_states(x, n):
    """[..., n * dim] -> [..., n, dim]"""
    *outer, width = shape_list(x)
    check_positive(n=n)
    if isinstance(width, int) and width % n:
        raise ValueError(f"the last dimension must be a multiple of {n}, got {width}")
    return tf.reshape(x, [*outer, n, width // n])


def merge_states(x):
    """[..., n, dim] -> [..., n * dim]"""
    *outer, n, dim = shape_list(x)
    return tf.reshape(x, [*outer, n * dim])


def shape_list(x):
    """The shape of x: ints, and scalar tensors for what only the running graph knows."""
    dynamic = tf.shape(x)
    return [dynamic[i] if n is None else n for i, n in enumerate(x.shape.as_list())]
