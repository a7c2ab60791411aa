"""The three-op family in dense float64 NumPy, and random cases of it."""

import numpy as np
from helpers import to_dtype


def to_dense(bst, blocks, nothing=0.0):
    """[batch, heads, blocks, b, b] -> [batch, heads, q_len, kv_len]"""
    size = bst.blk_size
    shape = blocks.shape[:2] + (bst.ctx_blks_q * size, bst.ctx_blks_k * size)
    dense = np.full(shape, nothing, blocks.dtype)
    for head, block, rows, columns in _places(bst):
        dense[:, head, rows, columns] = blocks[:, head, block]
    return dense


def from_dense(bst, dense):
    """[batch, heads, q_len, kv_len] -> [batch, heads, blocks, b, b]"""
    shape = (len(dense), bst.heads, bst.blocks) + bst.blk_shape
    blocks = np.zeros(shape, dense.dtype)
    for head, block, rows, columns in _places(bst):
        blocks[:, head, block] = dense[:, head, rows, columns]
    return blocks


def _places(bst):
    size = bst.blk_size
    for head in range(bst.heads):
        for block, (q, k) in enumerate(bst.nt_list[head % bst.lut_heads]):
            rows, columns = (slice(i * size, (i + 1) * size) for i in (q, k))
            yield head, block, rows, columns


def attends(bst, autoregress_at_key=None):
    """bool [heads, q_len, kv_len]: computed, and allowed by the mask."""
    masks = np.ones((1, bst.heads, bst.blocks) + bst.blk_shape, bool)
    if bst.softmax_mask_np is not None:
        bits = np.arange(bst.blk_size, dtype=bst.softmax_mask_np.dtype)
        masks[0] = bst.softmax_mask_np[..., None] >> bits & 1
    dense = to_dense(bst, masks, nothing=False)[0]
    if autoregress_at_key is not None:
        query, key = np.ogrid[: dense.shape[1], : dense.shape[2]]
        dense &= (key < autoregress_at_key) | (key <= query)
    return dense


def by_head(bst, x):
    """[batch, len, heads * dim] -> float64 [batch, heads, len, dim]"""
    x = np.asarray(x).astype(np.float64)
    return x.reshape(x.shape[:2] + (bst.heads, -1)).transpose(0, 2, 1, 3)


def merge_heads(x):
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def nt(bst, a, b):
    return from_dense(bst, by_head(bst, a) @ by_head(bst, b).swapaxes(2, 3))


def nn(bst, a, b):
    return merge_heads(to_dense(bst, a.astype(np.float64)) @ by_head(bst, b))


def tn(bst, a, b):
    a = to_dense(bst, a.astype(np.float64)).swapaxes(2, 3)
    return merge_heads(a @ by_head(bst, b))


def softmax(bst, x, scale, autoregress_at_key=None):
    """A query with blocks but no allowed key weighs all their keys alike."""
    ones = np.ones((1, bst.heads, bst.blocks) + bst.blk_shape, bool)
    computed = to_dense(bst, ones, nothing=False)
    allowed = attends(bst, autoregress_at_key)
    is_silent = ~allowed.any(axis=2, keepdims=True)
    s = np.where(is_silent, 0.0, scale * to_dense(bst, x.astype(np.float64)))
    s = np.where(np.where(is_silent, computed, allowed), s, -np.inf)
    row_max = np.maximum(s.max(axis=3, keepdims=True), np.finfo(np.float64).min)
    p = np.exp(s - row_max)
    row_sum = p.sum(axis=3, keepdims=True)
    return from_dense(bst, p / np.where(row_sum == 0, 1, row_sum))


def softmax_grad(bst, dy, y, scale):
    dy, y = (to_dense(bst, x.astype(np.float64)) for x in (dy, y))
    delta = np.sum(dy * y, axis=3, keepdims=True)
    return from_dense(bst, scale * y * (dy - delta))


# ---- random cases ----


def random_layout(heads, seed=0):
    """3 x 4 blocks; heads have different numbers of them."""
    random = np.random.RandomState(seed)
    layout = random.random_sample((heads, 3, 4)) < 0.6
    layout[:, 1] = False  # queries without keys
    layout[:, :, 2] = False  # keys without queries
    layout[:, 0, 0] = True
    return layout


def random_mask(blk_shape, head_idx, query_blk_idx, key_blk_idx, blk_idx):
    seed = (head_idx * 101 + query_blk_idx) * 101 + key_blk_idx
    return np.random.RandomState(seed).random_sample(blk_shape) < 0.7


def rows(bst, side, head_dim, dtype, seed, batch=2):
    blocks = {"q": bst.ctx_blks_q, "kv": bst.ctx_blks_k}[side]
    shape = (batch, blocks * bst.blk_size, bst.heads * head_dim)
    return to_dtype(np.random.RandomState(seed).standard_normal(shape), dtype)


def blocks_of(bst, dtype, seed, batch=2):
    """Random blocks, the unused ones too: they must not matter."""
    shape = (batch, bst.heads, bst.blocks) + bst.blk_shape
    return to_dtype(np.random.RandomState(seed).standard_normal(shape), dtype)


def f32(x):
    return np.asarray(x).astype(np.float32)
