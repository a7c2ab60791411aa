"""Tile plans: which keys each q tile reads, and which queries each kv tile.

These are the lists that kernels read, made of a `BlockMask`'s blocks.
"""

from typing import NamedTuple

import numpy as np

from .tiling import EFFICIENCY, PASSING

EMPTY, PARTIAL, FULL = 0, 1, 2  # kinds of blocks


class Blocks(NamedTuple):
    """All blocks of the score matrix."""

    kinds: np.ndarray  # int8 [heads, q_blocks, kv_blocks]: EMPTY, PARTIAL or FULL
    partial: np.ndarray  # [PARTIAL blocks], their flat indices in kinds, increasing
    mask_ids: np.ndarray  # int32 [PARTIAL blocks], index into mask_bits
    mask_bits: np.ndarray  # uint8 [mask_blocks, block_size, tile_q / 8]

    @property
    def block_size(self):
        return self.mask_bits.shape[1]

    def codes(self, head, q_block, kv_block):
        """The place of each block's elements in `code_bits`: int32, broadcast."""
        block = np.ravel_multi_index((head, q_block, kv_block), self.kinds.shape)
        kinds = self.kinds[head, q_block, kv_block]
        codes = np.array([0, 2, 1], np.int32)[kinds]  # by EMPTY, PARTIAL, FULL
        is_partial = kinds == PARTIAL
        found = np.searchsorted(self.partial, block[is_partial])
        codes[is_partial] += self.mask_ids[found]
        return codes

    def code_bits(self):
        """The elements of EMPTY, of FULL, then those of the mask blocks.

        Returns:
          uint8 [codes, block_size, block_size / 8].
        """
        empty = np.zeros((1, *self.mask_bits.shape[1:]), np.uint8)
        return np.concatenate([empty, ~empty, self.mask_bits])


class Tiles(NamedTuple):
    """Which keys each q tile reads: the arrays of `SpattnPlan` in csrc/abi/core.h.

    Bit q % 8 of `mask_bits[i, kv, q // 8]` is set where query q of the tile attends to
    key kv of the block.
    """

    tile_q: int  # positions in a q tile
    block_size: int  # positions in a kv block
    kv_indptr: np.ndarray  # int32 [heads * q_tiles + 1], offsets into kv_indices
    kv_indices: np.ndarray  # int32 [entries], kv blocks, increasing within a q tile
    mask_ids: np.ndarray  # int32 [entries], index into mask_bits; -1: FULL
    mask_bits: np.ndarray  # uint8 [mask_blocks, block_size, tile_q / 8]


class KvTiles(NamedTuple):
    """Which queries each kv tile reads: the arrays of `SpattnKvPlan` in csrc/abi/core.h.

    Bit k % 8 of `mask_bits[i, q, k // 8]` is set where query q of the block attends to
    key k of the tile.
    """

    tile_kv: int  # positions in a kv tile
    block_size: int  # positions in a q block and in a kv block
    tile_blocks: np.ndarray  # int32 [shares, kv_tiles, tile_kv / block_size], -1: none
    q_indptr: np.ndarray  # int32 [heads * kv_tiles + 1], offsets into q_indices
    q_indices: np.ndarray  # int32 [entries], q blocks, increasing within a kv tile
    mask_ids: np.ndarray  # int32 [entries], index into mask_bits; -1: FULL
    mask_bits: np.ndarray  # uint8 [mask_blocks, block_size, tile_kv / 8]


# ---- plans by queries ----


def cheapest(blocks, sizes):
    """The size of q tile that computes the fewest elements over `EFFICIENCY`."""

    def cost(tile_q):
        entries = np.count_nonzero(_tile_kinds(blocks, tile_q).max(axis=2))
        return entries * tile_q / EFFICIENCY[tile_q]

    return min(sizes, key=cost)


def tiles_of(blocks, tile_q):
    """What `BlockMask.tiles` gives for a size that has been checked."""
    kinds = _tile_kinds(blocks, tile_q)
    is_read = kinds.max(axis=2) != EMPTY
    is_mixed = is_read & (kinds.min(axis=2) != FULL)
    head, tile, kv_block = (i[:, None] for i in np.nonzero(is_mixed))
    q_block = tile * kinds.shape[2] + np.arange(kinds.shape[2])
    q_block = np.minimum(q_block, blocks.kinds.shape[1] - 1)
    codes = blocks.codes(head, q_block, kv_block)
    seen: dict = {}
    mask_ids = np.full(np.count_nonzero(is_read), -1, np.int32)
    mask_ids[is_mixed[is_read]] = number(codes, seen)
    codes = np.frombuffer(b"".join(seen), codes.dtype).reshape(-1, kinds.shape[2])
    mask_bits = blocks.code_bits()[codes].transpose(0, 2, 1, 3)
    mask_bits = mask_bits.reshape(-1, blocks.block_size, tile_q // 8)
    mask_bits = np.ascontiguousarray(mask_bits)  # the kernels read it as it lies
    freeze(mask_ids, mask_bits)
    indptr, indices = csr(is_read)
    return Tiles(tile_q, blocks.block_size, indptr, indices, mask_ids, mask_bits)


def _tile_kinds(blocks, tile_q):
    """The kinds by tiles: int8 [heads, q_tiles, q blocks of a tile, kv_blocks].

    The last q block is repeated until it fills the last tile: only rows that do not
    exist see the difference.
    """
    heads, q_blocks, kv_blocks = blocks.kinds.shape
    count = tile_q // blocks.block_size
    padding = [(0, 0), (0, -q_blocks % count), (0, 0)]
    kinds = np.pad(blocks.kinds, padding, mode="edge")
    return kinds.reshape(heads, -1, count, kv_blocks)


# ---- plans by keys ----


def kv_tiles_of(blocks, tile_kv, group):
    """What `BlockMask.kv_tiles` gives for a size and a group that have been checked."""
    block_size, (heads, _, kv_blocks) = blocks.block_size, blocks.kinds.shape
    count = tile_kv // block_size
    shares = 1 if heads == 1 else heads // group
    collected, known = [], {}
    for kinds in blocks.kinds.reshape(shares, -1, kv_blocks):
        key = np.packbits(kinds != EMPTY).tobytes()
        if key not in known:
            lists = _by_key(kinds)[:-1] != EMPTY
            known[key] = _collect(lists, count, PASSING // block_size)
        collected.append(known[key])
    tiles = max(map(len, collected))
    tile_blocks = np.full((shares, tiles, count), -1, np.int32)
    for share, owned in zip(tile_blocks, collected):
        share[: len(owned)] = owned
    reads, mask_ids, seen = [], [], {}
    for head in range(heads):
        owned = tile_blocks[head * shares // heads]
        kinds = _by_key(blocks.kinds[head])[owned.T]  # [count, tiles, q]
        reads.append(kinds.any(axis=0))
        is_mixed = reads[-1] & (kinds.min(axis=0) != FULL)
        tile, q_block = np.nonzero(is_mixed)
        codes = blocks.codes(head, q_block[:, None], np.maximum(owned, 0)[tile])
        codes[owned[tile] < 0] = 0  # EMPTY
        mask_ids.append(np.full(np.count_nonzero(reads[-1]), -1, np.int32))
        mask_ids[-1][is_mixed[reads[-1]]] = number(codes, seen)
    codes = np.frombuffer(b"".join(seen), np.int32).reshape(-1, count)
    elements = np.unpackbits(blocks.code_bits(), axis=2, bitorder="little")
    elements = elements[codes].transpose(0, 3, 1, 2)  # [mask_blocks, q, block, kv]
    elements = np.ascontiguousarray(elements)  # packbits keeps the order in memory
    elements = elements.reshape(-1, block_size, tile_kv)
    mask_bits = np.packbits(elements, axis=2, bitorder="little")
    ids = np.concatenate(mask_ids)
    freeze(tile_blocks, ids, mask_bits)
    indptr, indices = csr(reads)
    return KvTiles(tile_kv, block_size, tile_blocks, indptr, indices, ids, mask_bits)


def _by_key(kinds):
    """`kinds` transposed, and a last row of EMPTY: int8 [kv_blocks + 1, q_blocks]."""
    by_key = np.full((kinds.shape[1] + 1, len(kinds)), EMPTY, np.int8)
    for start in range(0, len(kinds), 16):  # 4 times as fast as at once
        by_key[:-1, start : start + 16] = kinds[start : start + 16].T
    return by_key


def _collect(lists, count, gather):
    """Puts kv blocks into tiles of up to `count` blocks, those with long lists first.

    It is greedy and makes two passes. At first every block is a tile. Each tile in turn
    looks at the next `32 * count` and takes the one that fits and shares most q blocks
    with it, until none fits. One fits if there is room for it, and if the tile reads at
    least half of its q blocks already. (The summary columns of `fixed` meet where a
    window has at most 32 blocks.)

    The second pass begins with the longest list, and counts steps instead of q blocks: the
    kernel takes `gather` q blocks in a step, so short lists may share one. A tile then
    fits if it adds at most half of the steps that it takes alone. This makes no new masks,
    because tiles with room have masks everywhere.

    Args:
      lists: bool [kv_blocks, q_blocks], the q blocks reading each kv block, those of all
        heads that share the tiles; overwritten.
      count: kv blocks in a tile.
      gather: q blocks in a step, counted as if one head had them all.

    Returns:
      int32 [tiles, count], -1: none.
    """
    tiles = [[block] for block in range(len(lists))]
    sizes, lengths = np.ones(len(lists), int), np.count_nonzero(lists, axis=1)
    order = np.arange(len(lists))
    for step in (1, gather):
        left = order[sizes[order] < count]
        while len(left):
            tile, near = left[0], left[1 : 1 + 32 * count]
            near = near[sizes[tile] + sizes[near] <= count]
            near_lists, new, shared = lists[near], np.flatnonzero(lists[tile]), 0
            while True:
                shared = shared + near_lists.take(new, axis=1).sum(axis=1)
                union = lengths[tile] + lengths[near] - shared
                added = -(-union // step) + -lengths[tile] // step
                fits = 2 * added <= -(-lengths[near] // step)
                fits &= (sizes[near] > 0) & (sizes[tile] + sizes[near] <= count)
                if not fits.any():
                    break
                best = near[np.argmax(np.where(fits, shared, -1))]
                new = np.flatnonzero(lists[best] > lists[tile])
                lists[tile, new] = True
                lengths[tile] += len(new)
                tiles[tile] += tiles[best]
                sizes[tile] += sizes[best]
                sizes[best] = 0
            left = left[1:]
            left = left[sizes[left] > 0]
        order = np.argsort(-lengths, kind="stable")
        order = order[sizes[order] > 0]
    filled = [sorted(tiles[i]) + [-1] * (count - sizes[i]) for i in order]
    return np.array(filled, np.int32)


# ---- both ----


def csr(is_read):
    """The True elements of each row of each head: int32 offsets, and their indices."""
    counts = [np.count_nonzero(head, axis=1) for head in is_read]
    offsets = np.cumsum(np.concatenate(counts), dtype=np.int32)
    indptr = np.concatenate([np.zeros(1, np.int32), offsets])
    indices = np.concatenate([np.nonzero(head)[1].astype(np.int32) for head in is_read])
    freeze(indptr, indices)
    return indptr, indices


def number(arrays, seen):
    """Numbers arrays from 0, equal ones alike; `seen` maps their bytes to the numbers."""
    return [seen.setdefault(array.tobytes(), len(seen)) for array in arrays]


def freeze(*arrays):
    for array in arrays:
        array.setflags(write=False)
