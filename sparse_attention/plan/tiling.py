"""Tile policy: how high and how wide the tiles are that kernels work on.

This file decides what a plan decides. `csrc/cuda/host/configs.cc` decides the rest, for
GPUs alone: which tiles fit a device's shared memory, and how a kernel works on them.
"""

# Block sizes, each with the share of its peak a kernel reaches on q tiles that high.
EFFICIENCY = {8: 0.35, 16: 0.55, 32: 0.75, 64: 0.92, 128: 1.0}
PASSING = 128  # queries that a kv tile reads at a time, at most

# kv tiles of 64 pay where they list at most so many times the blocks of those of 128: 1.5
# for `local` and `strided` (dkv: 0.54 for 0.61 ms, 0.49 for 0.53), 1.9 for `fixed` and
# 2 for `all`, where they cost (3.7 for 3.4 ms). Not with head_dim 128 (0.81 for 0.53).
HALF_TILE = 1.6


def kv_tile_sizes(tile_kv, block_size, head_dims):
    """[int]: the sizes of kv tile to choose from, the largest first.

    Args:
      tile_kv: The largest that fits the GPU.
      block_size: Side of a block of the plan.
      head_dims: head_dim and head_dim_v.
    """
    may_halve = tile_kv == 128 > block_size and max(head_dims) <= 64
    return [128, 64] if may_halve else [tile_kv]


def choose(block_mask, tile_q, tile_kv, head_dims, group):
    """The `Tiles` and `KvTiles` of a BlockMask that a GPU runs best.

    Args:
      block_mask: `BlockMask`.
      tile_q, tile_kv: The largest tiles that fit the GPU.
      head_dims: head_dim and head_dim_v.
      group: Query heads that share a kv head.
    """
    kv_tiles, *halves = (
        block_mask.kv_tiles(size, group)
        for size in kv_tile_sizes(tile_kv, block_mask.block_size, head_dims)
    )
    for half in halves:
        if len(half.q_indices) < HALF_TILE * len(kv_tiles.q_indices):
            kv_tiles = half
    return block_mask.tiles(tile_q), kv_tiles
