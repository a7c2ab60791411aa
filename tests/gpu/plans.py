"""Plans of the CUDA kernels (csrc/cuda/params.h) from a BlockMask, in NumPy.

`by_q` is BlockMask's own `tiles`. `by_kv`, its transpose, is built here for now; it
needs nothing but `tiles(block_size)`, so that it can move to block_mask.py.
"""

from collections import namedtuple

import numpy as np

EMPTY, FULL = -2, -1  # beside mask ids from 0

# The fields of SpattnTilePlan; the other sizes are lengths of the arrays.
TilePlan = namedtuple(
    "TilePlan", "heads tiles blocks tile_blocks indptr indices mask_ids mask_bits"
)


def by_q(block_mask, block_q):
    """What attention_fwd and attention_bwd_dq read: q tiles and their kv blocks."""
    tiles = block_mask.tiles(block_q)
    q_tiles = (len(tiles.kv_indptr) - 1) // block_mask.heads
    return TilePlan(block_mask.heads, q_tiles, block_mask.kv_blocks, None, *tiles[2:])


def by_kv(block_mask, block_kv, group=1):
    """What attention_bwd_dkv reads: kv tiles of `block_kv` keys and their q blocks.

    A tile collects kv blocks that nearly the same queries read, neighbours or not: a
    summary column of `fixed` is read by all later queries, the blocks beside it by few,
    and a tile that mixed them would compute all of its rows for all of those queries.

    Args:
      block_mask: `BlockMask`.
      block_kv: Keys in a tile, a multiple of block_size.
      group: Query heads that share a kv head: they get the same tiles.

    Returns:
      `TilePlan`; tiles with the longest lists first.
    """
    ids, element_bits = _block_ids(block_mask)
    heads, q_blocks, kv_blocks = ids.shape
    owned = block_kv // block_mask.block_size
    shares = 1 if heads == 1 else heads // group
    by_share = ids.reshape(
        shares, -1, kv_blocks
    )  # the q blocks of all heads of a group
    collected = [_collect(share != EMPTY, owned) for share in by_share]
    tiles = max(len(share) for share in collected)
    tile_blocks = np.full((shares, tiles, owned), -1, np.int32)
    for share, blocks in enumerate(collected):
        tile_blocks[share, : len(blocks)] = blocks

    # [heads, tiles, q_blocks, owned]: what each owned block is to each q block.
    padded = np.concatenate([ids, np.full((heads, q_blocks, 1), EMPTY, ids.dtype)], 2)
    of_head = np.repeat(tile_blocks, heads // shares, axis=0)
    codes = np.stack([padded[h][:, of_head[h]] for h in range(heads)]).swapaxes(1, 2)
    is_read = (codes != EMPTY).any(axis=3)
    is_full = (codes == FULL).all(axis=3)
    mixed = np.ascontiguousarray(codes[is_read & ~is_full])
    blocks, number = np.unique(mixed, axis=0, return_inverse=True)
    mask_ids = np.full(is_read.shape, FULL, np.int32)
    mask_ids[is_read & ~is_full] = number.reshape(-1)
    # [mask_blocks, owned, kv, q] -> bits along the tile's keys
    elements = (
        element_bits[blocks]
        .transpose(0, 3, 1, 2)
        .reshape(len(blocks), block_mask.block_size, block_kv)
    )
    indptr = np.concatenate([[0], np.cumsum(is_read.sum(axis=2).ravel())])
    return TilePlan(
        heads,
        tiles,
        q_blocks,
        tile_blocks,
        indptr.astype(np.int32),
        np.nonzero(is_read)[2].astype(np.int32),
        mask_ids[is_read],
        np.packbits(elements, axis=2, bitorder="little"),
    )


def _block_ids(block_mask):
    """int32 [heads, q_blocks, kv_blocks] ids; bool [ids, kv, q] what they allow."""
    tiles = block_mask.tiles(block_mask.block_size)
    heads, q_blocks, kv_blocks = block_mask.block_kinds.shape
    ids = np.full((heads * q_blocks, kv_blocks), EMPTY, np.int32)
    rows = np.repeat(np.arange(heads * q_blocks), np.diff(tiles.kv_indptr))
    ids[rows, tiles.kv_indices] = tiles.mask_ids
    size = block_mask.block_size
    elements = np.unpackbits(tiles.mask_bits, axis=2, bitorder="little").astype(bool)
    ends = np.stack([np.zeros((size, size), bool), np.ones((size, size), bool)])
    elements = np.concatenate([elements.reshape(-1, size, size), ends])  # [-2], [-1]
    return ids.reshape(heads, q_blocks, kv_blocks), elements


def _collect(is_read, owned, ahead=64):
    """Puts kv blocks into tiles of `owned`; longest lists first.

    Greedy: a tile starts with the first block that has none and takes, of the next
    `ahead`, the one that shares most q blocks with it, if those are half of its own.

    Args:
      is_read: bool [q_blocks, kv_blocks].

    Returns:
      int32 [tiles, owned], -1: none.
    """
    left = list(range(is_read.shape[1]))
    lists = is_read.T
    tiles, costs = [], []
    while left:
        tile, union = [left[0]], lists[left[0]].copy()
        left = left[1:]
        while len(tile) < owned and left:
            candidates = left[:ahead]
            lengths = lists[candidates].sum(axis=1)
            shared = (lists[candidates] & union).sum(axis=1)
            fits = lengths - shared <= lengths / 2  # q blocks that the tile reads anew
            if not fits.any():
                break
            best = int(np.argmax(np.where(fits, shared, -1)))
            union |= lists[candidates[best]]
            tile.append(left.pop(best))
        tiles.append(sorted(tile) + [-1] * (owned - len(tile)))
        costs.append(union.sum())
    return np.array(tiles, np.int32)[np.argsort(-np.array(costs), kind="stable")]
