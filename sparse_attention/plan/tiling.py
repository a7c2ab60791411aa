"""Tile policy: how high and how wide the tiles are that kernels work on.

This file decides what depends on the plan. `csrc/cuda/host/configs.cc` decides the rest, for
GPUs alone: which tiles fit a device's shared memory, and how a kernel works on them.
"""

# The block sizes, each with the share of its peak that a kernel reaches on q tiles so high.
EFFICIENCY = {8: 0.35, 16: 0.55, 32: 0.75, 64: 0.92, 128: 1.0}
PASSING = 128  # queries that a kv tile reads at a time, at most

# Tiles of 64 keys pay where they list fewer than so many times the blocks that tiles of 128
# list. It is 1.5 times for `local` and `strided`, where dkv takes 0.54 instead of 0.61 ms,
# and 0.49 instead of 0.53. It is 1.9 times for `fixed` and 2 for `all`, where they cost time:
# 3.7 instead of 3.4 ms. With head_dim 128 they never pay: 0.81 instead of 0.53 ms.
HALF_TILE = 1.6


def kv_tile_sizes(tile_kv, block_size, head_dims):
    """The sizes of kv tile to choose from, [int], the largest first.

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
