"""Block-sparse attention in TensorFlow's own ops: without kernels, and in portable graphs.

Every entry of the plan is a pair of a q tile and a kv block. All pairs are gathered and
multiplied in one batch; maxima and sums over the blocks of a q tile are segment sums.
The scores of all computed blocks are a tensor, unlike in the kernels. TensorFlow
differentiates it.

A key that no query of its head attends to is set to zero first, so nothing that it
holds can leak. NaN or Inf in a key that some query attends to does reach the other
queries of that query's tile: 0 * NaN is NaN.
"""

import functools
import warnings
from collections import namedtuple

import numpy as np
import tensorflow as tf

from . import fallback_rule
from .plan_tensors import kept

# A plan as these ops read it, for all heads; n pairs.
Pairs = namedtuple(
    "Pairs",
    [
        "q_tile",  # int [n], head * q_tiles + tile
        "kv_block",  # int [n], kv head * kv_blocks + block
        "mask_ids",  # int [n], into `masks`
        "masks",  # bool [mask_blocks + 1, tile_q, block_size]; the last is all True
        "is_attended",  # bool [kv_len, kv_heads, 1], by any query
        "q_rows",  # int [q_tiles, tile_q], row of each position, or q_len: it has none
        "kv_rows",  # int [kv_blocks, block_size], likewise
        "q_positions",  # int [q_len], the position of each row
    ],
)


def attention(
    q,
    k,
    v,
    block_mask,
    heads,
    kv_heads,
    softmax_scale,
    kv_lengths,
    rule,
    return_lse,
    name,
    why_not,
):
    """`block_sparse_attention` for arguments that it has checked; returns o and lse.

    lse is None unless it is asked for: it may be -inf, at which
    `tf.debugging.enable_check_numerics` stops. `why_not` says what is in the way of the
    kernels; None: the user asked for this path.
    """
    if why_not is not None:
        _warn_once(why_not)
    with tf.name_scope(name or "block_sparse_attention"):
        made, key = kept(block_mask), ("pairs", heads, kv_heads)
        if key not in made:
            made[key] = _pairs(block_mask, heads, kv_heads)
        pairs = made[key]
        q_len, kv_len = tf.shape(q)[1], tf.shape(k)[1]
        lengths = block_mask.q_len, block_mask.kv_len
        is_shorter = (q.shape[1], k.shape[1]) != lengths
        if is_shorter:
            q, k, v, rule = _as_long_as_the_plan(q, k, v, rule, lengths)
            if kv_lengths is None:
                kv_lengths = kv_len[None]
        end = _end(kv_lengths, block_mask.kv_len)
        rows = np.arange(block_mask.kv_len)[:, None, None]
        exists = pairs.is_attended & (rows < end[:, None, None, None])
        exists = fallback_rule.exist_for_any(exists, rule)
        q_tiles = _blocks(_split(q, heads) * softmax_scale, pairs.q_rows)
        k_blocks = _blocks(_select(exists, _split(k, kv_heads), 0.0), pairs.kv_rows)
        v_blocks = _blocks(_select(exists, _split(v, kv_heads), 0.0), pairs.kv_rows)
        placed = fallback_rule.PlacedRule(rule, pairs, heads, tf.shape(q)[0])
        o, row_max, row_sum = _attend(q_tiles, k_blocks, v_blocks, pairs, end, placed)
        o = _rows(o, heads, pairs)
        o = tf.reshape(o, [tf.shape(q)[0], block_mask.q_len, heads * o.shape[3]])
        o = tf.cast(o, q.dtype)
        o = o[:, :q_len] if is_shorter else o
        if not return_lse:
            return o, None
        lse = row_max + tf.math.log(_select(row_sum > 0, row_sum, 1.0))
        lse = _select(row_sum > 0, lse, -np.inf)
        lse = _rows(lse[..., None], heads, pairs)[..., 0]
        lse = tf.transpose(lse, [0, 2, 1])
        return o, lse[:, :, :q_len] if is_shorter else lse


def _as_long_as_the_plan(q, k, v, rule, lengths):
    """The same with rows of zeros, which belong to no segment, up to the plan's lengths."""

    def pad(x, axis, length, value=0):
        shape = x.shape.as_list()
        missing = [
            (length - tf.shape(x)[axis]) * (i == axis) for i in range(len(shape))
        ]
        x = tf.pad(x, [[0, count] for count in missing], constant_values=value)
        x.set_shape([length if i == axis else n for i, n in enumerate(shape)])
        return x

    inputs = dict(rule.inputs)
    for name, length in zip(("q_segments", "kv_segments"), lengths):
        if name in inputs:
            inputs[name] = pad(inputs[name], 1, length, -1)
    for axis, length in zip((2, 3), lengths):
        if "mask" in inputs and inputs["mask"].shape.as_list()[axis] != 1:
            inputs["mask"] = pad(inputs["mask"], axis, length, False)
    q_len, kv_len = lengths
    q, k, v = pad(q, 1, q_len), pad(k, 1, kv_len), pad(v, 1, kv_len)
    return q, k, v, rule._replace(inputs=inputs)


def _attend(q_tiles, k_blocks, v_blocks, pairs, end, rule):
    """o of the q tiles, [heads * q_tiles, batch, tile_q, dim], row maxima and row sums."""

    def gather_tile(x):
        return tf.gather(x, pairs.q_tile)

    def sum_tile(x):
        return tf.math.unsorted_segment_sum(x, pairs.q_tile, q_tiles.shape[0])

    s = tf.matmul(
        gather_tile(q_tiles), tf.gather(k_blocks, pairs.kv_block), transpose_b=True
    )
    kv_rows = tf.gather(pairs.kv_rows, pairs.kv_block % len(pairs.kv_rows))
    allowed = tf.gather(pairs.masks, pairs.mask_ids)[:, None]
    allowed &= kv_rows[:, None, None, :] < end[:, None, None]
    allowed = rule.allowed(allowed)
    s = _select(allowed, rule.scores(s), s.dtype.min)
    row_max = tf.stop_gradient(
        tf.math.unsorted_segment_max(
            tf.reduce_max(s, axis=3), pairs.q_tile, q_tiles.shape[0]
        )
    )
    # Where all keys are masked, s is row_max.
    p = _select(allowed, tf.exp(s - gather_tile(row_max)[..., None]), 0.0)
    row_sum = sum_tile(tf.reduce_sum(p, axis=3))
    p /= gather_tile(_select(row_sum > 0, row_sum, 1.0))[..., None]
    o = sum_tile(tf.matmul(rule.drop(p), tf.gather(v_blocks, pairs.kv_block)))
    return o, row_max, row_sum


def _end(kv_lengths, kv_len):
    """int32 [batch or 1]: the first key that does not exist, after the op's checks."""
    if kv_lengths is None:
        return tf.constant([kv_len])
    expectation = f"kv_lengths must be in [0, kv_len={kv_len}]"
    is_valid = [
        tf.compat.v1.assert_non_negative(kv_lengths, message=expectation),
        tf.compat.v1.assert_less_equal(kv_lengths, kv_len, message=expectation),
    ]
    with tf.control_dependencies([check for check in is_valid if check is not None]):
        return tf.identity(kv_lengths)


def _split(x, heads):
    """[batch, len, heads * dim] -> float32 [batch, len, heads, dim]"""
    _, length, width = x.shape.as_list()
    x = tf.reshape(x, [tf.shape(x)[0], length, heads, width // heads])
    return tf.cast(x, tf.float32)


def _blocks(x, rows):
    """[batch, len, heads, dim] -> [heads * blocks, batch, block, dim]"""
    _, _, heads, dim = x.shape.as_list()
    x = tf.pad(x, [[0, 0], [0, 1], [0, 0], [0, 0]])  # the row of positions without one
    x = tf.transpose(tf.gather(x, rows, axis=1), [3, 1, 0, 2, 4])
    blocks, block = rows.shape
    return tf.reshape(x, [heads * blocks, tf.shape(x)[2], block, dim])


def _rows(x, heads, pairs):
    """[heads * tiles, batch, block, dim] -> [batch, len, heads, dim]"""
    tiles, block = pairs.q_rows.shape
    dim = x.shape[3]
    x = tf.reshape(x, [heads, tiles, tf.shape(x)[1], block, dim])
    x = tf.transpose(x, [2, 1, 3, 0, 4])
    x = tf.reshape(x, [tf.shape(x)[0], tiles * block, heads, dim])
    return tf.gather(x, pairs.q_positions, axis=1)


def _select(condition, x, y):
    return tf.compat.v1.where_v2(condition, x, y)


def _pairs(block_mask, heads, kv_heads):
    """The `Pairs` of a `BlockMask`."""
    tile_q, block_size, kv_indptr, kv_indices, mask_ids, mask_bits = block_mask.tiles()
    stride = block_mask.row_stride
    q_rows, q_positions = _axis(block_mask.q_len, stride, tile_q)
    kv_rows, kv_positions = _axis(block_mask.kv_len, stride, block_size)
    counts = np.diff(kv_indptr)
    q_tile = np.repeat(np.arange(len(counts)), counts)
    if block_mask.heads < heads:  # one plan for all heads
        shift = np.repeat(np.arange(heads), len(q_tile)) * len(counts)
        q_tile = np.tile(q_tile, heads) + shift
        kv_indices, mask_ids = np.tile(kv_indices, heads), np.tile(mask_ids, heads)
    kv_head = q_tile // len(q_rows) // (heads // kv_heads)
    masks = np.unpackbits(mask_bits, axis=2, bitorder="little").astype(bool)
    masks = np.concatenate([masks, np.ones([1, block_size, tile_q], bool)])
    mask_ids = np.where(mask_ids < 0, len(masks) - 1, mask_ids)
    kv_block = kv_head * len(kv_rows) + kv_indices
    is_attended = np.zeros([kv_heads * len(kv_rows), block_size], bool)
    np.logical_or.at(is_attended, kv_block, np.any(masks, axis=2)[mask_ids])
    is_attended = is_attended.reshape(kv_heads, -1)[:, kv_positions]
    return Pairs(
        q_tile,
        kv_block,
        mask_ids,
        masks.transpose(0, 2, 1),
        is_attended.T[..., None],
        q_rows,
        kv_rows,
        q_positions,
    )


def _axis(length, row_stride, block):
    """The row of each position, [blocks, block], and the position of each row.

    A position that has no row is given `length`.
    """
    row = np.arange(length)
    visits = -(-length // row_stride)
    positions = row % row_stride * visits + row // row_stride
    blocks = -(-visits * row_stride // block)
    rows = np.full(blocks * block, length, np.int32)
    rows[positions] = row
    return rows.reshape(blocks, block), positions


@functools.lru_cache(maxsize=None)
def _warn_once(why_not):
    warnings.warn(
        "the attention kernels cannot be compiled here, or do not load, so TensorFlow's "
        f"own ops do the work, more slowly: {why_not}; "
        "`python -m sparse_attention.doctor` says more",
        RuntimeWarning,
        stacklevel=5,
    )
