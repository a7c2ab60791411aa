"""The lists that kernels read against the elements that a plan is made of."""

import itertools

import numpy as np
import pytest
from helpers import NO_ROWS_IN_A_BLOCK, cases, in_blocks, in_positions
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_attention.plan import masks
from sparse_attention.plan.block_mask import BlockMask
from sparse_attention.plan.patterns import pattern_block_mask


@settings(max_examples=60)
@given(cases())
@example(NO_ROWS_IN_A_BLOCK)
def test_tiles_of_every_size_hold_the_exact_pattern(case):
    in_order = in_positions(case)
    size = case.block_size
    for tile_q in [n for n in (8, 16, 32, 64, 128) if n >= size]:
        tiles = BlockMask(*case).tiles(tile_q)
        assert (tiles.tile_q, tiles.block_size) == (tile_q, size)
        allowed, exists = (in_blocks(x, tile_q, size) for x in in_order)
        # Every (head, q tile) in a row, as the offsets have them.
        allowed, exists = (x.reshape((-1,) + x.shape[2:]) for x in (allowed, exists))
        bits = np.unpackbits(tiles.mask_bits, axis=2, bitorder="little").astype(bool)
        got = np.zeros(allowed.shape, bool)
        is_full = np.zeros(allowed.shape[:2], bool)
        ends = tiles.kv_indptr.tolist()
        assert len(ends) == len(allowed) + 1
        assert (ends[0], ends[-1]) == (0, len(tiles.mask_ids))
        for i, (start, end) in enumerate(zip(ends, ends[1:])):
            kv_blocks = tiles.kv_indices[start:end].tolist()
            assert kv_blocks == np.flatnonzero(allowed[i].any(axis=(1, 2))).tolist()
            for kv_block, mask_id in zip(kv_blocks, tiles.mask_ids[start:end]):
                is_full[i, kv_block] = mask_id == -1
                got[i, kv_block] = True if mask_id == -1 else bits[mask_id].T
        np.testing.assert_array_equal(got & exists, allowed)
        if case.row_stride <= case.q_len:  # beyond, whole q blocks hold no row
            is_whole = (allowed == exists).all(axis=(2, 3)) & allowed.any(axis=(2, 3))
            np.testing.assert_array_equal(is_full, is_whole)
        assert len(set(map(bytes, tiles.mask_bits))) == len(tiles.mask_bits)
        assert set(tiles.mask_ids) - {-1} == set(range(len(tiles.mask_bits)))


@settings(max_examples=60)
@given(cases(), st.booleans())
@example(NO_ROWS_IN_A_BLOCK, False)
def test_kv_tiles_of_every_size_hold_the_exact_pattern(case, is_grouped):
    allowed, exists = in_positions(case)
    size, heads = case.block_size, len(allowed)
    group = heads if is_grouped else 1
    shares = 1 if heads == 1 else heads // group
    for tile_kv in [n for n in (32, 64, 128) if n >= size]:
        tiles = BlockMask(*case).kv_tiles(tile_kv, group)
        assert (tiles.tile_kv, tiles.block_size) == (tile_kv, size)
        assert tiles.tile_blocks.shape[::2] == (shares, tile_kv // size)
        for blocks in tiles.tile_blocks:  # every kv block is in one tile
            owned = np.sort(blocks[blocks >= 0])
            np.testing.assert_array_equal(owned, np.arange(allowed.shape[2] // size))
        bits = np.unpackbits(tiles.mask_bits, axis=2, bitorder="little").astype(bool)
        got = np.zeros(allowed.shape, bool)
        ends = tiles.q_indptr.tolist()
        assert (ends[0], ends[-1]) == (0, len(tiles.mask_ids))
        of_heads = np.repeat(tiles.tile_blocks, heads // shares, axis=0)
        lists = [(head, blocks) for head in range(heads) for blocks in of_heads[head]]
        assert len(lists) == len(ends) - 1
        for (head, blocks), start, end in zip(lists, ends, ends[1:]):
            assert (np.diff(tiles.q_indices[start:end]) > 0).all()
            for q_block, mask_id in zip(
                tiles.q_indices[start:end], tiles.mask_ids[start:end]
            ):
                entry = np.ones((size, tile_kv), bool) if mask_id < 0 else bits[mask_id]
                assert entry.any()
                rows = slice(q_block * size, (q_block + 1) * size)
                for i, block in enumerate(blocks):
                    part = entry[:, i * size : (i + 1) * size]
                    if block < 0:
                        assert mask_id >= 0 and not part.any()
                    else:
                        got[head, rows, block * size : (block + 1) * size] = part
        np.testing.assert_array_equal(got & exists, allowed)
        assert len(set(map(bytes, tiles.mask_bits))) == len(tiles.mask_bits)


@pytest.mark.parametrize("block_size, window", [(8, 16), (16, 4), (32, 32)])
def test_kv_tiles_gather_what_the_same_queries_read(block_size, window):
    """The summary blocks of `fixed`, each the last of its window, lie together."""
    ctx = window * block_size
    block_mask = pattern_block_mask("fixed", 32 * ctx, 2, block_size, ctx, num_verts=1)
    longest = block_mask.kv_tiles(128).tile_blocks[0, 0]
    np.testing.assert_array_equal(longest % window, window - 1)


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_kv_tiles_are_full_where_no_two_blocks_share_queries(block_size):
    """In `strided` with 8 visits to a residue, each kv block is its own q block's."""
    block_mask = pattern_block_mask("strided", 1024, 8, block_size, 128)
    np.testing.assert_array_equal(block_mask.layout[0], np.eye(1024 // block_size))
    for tile_kv in 64, 128:
        tiles = block_mask.kv_tiles(tile_kv)
        assert tiles.tile_blocks.shape[1] == 1024 // tile_kv
        np.testing.assert_array_equal(
            np.sort(tiles.tile_blocks.ravel()), np.arange(1024 // block_size)
        )


@pytest.mark.parametrize(
    "readers, expected", [(1, 2), (2, 4), (3, 8), (4, 8), (6, 4), (9, 8), (40, 8)]
)
def test_kv_tiles_mix_queries_only_where_that_saves_steps(readers, expected):
    """Eight kv blocks with as many q blocks each, of which four are a step."""
    layout = np.kron(np.eye(8), np.ones([readers, 1]))
    tiles = BlockMask(layout, block_size=32).kv_tiles(128)
    assert tiles.tile_blocks.shape == (1, expected, 4)
    assert (tiles.tile_blocks >= 0).sum() == 8


def test_kv_tiles_mix_short_lists_into_long_ones_where_that_is_free():
    """Five q blocks take two steps, so those of three more blocks find a place."""
    layout = np.kron(np.eye(4), np.ones([5, 1]))[:8]
    layout[5:, 1:] = np.eye(3)
    tiles = BlockMask(layout, block_size=32).kv_tiles(128)
    np.testing.assert_array_equal(tiles.tile_blocks, [[[0, 1, 2, 3]]])
    assert tiles.q_indptr.tolist() == [0, 8]


def test_equal_mask_blocks_are_stored_once():
    for mode in "all", "local", "strided", "fixed":
        block_mask = pattern_block_mask(mode, 4096, 4, 32, local_attn_ctx=128)
        assert len(block_mask.tiles(32).mask_bits) == (2 if mode == "local" else 1)


def test_the_cheapest_tile_is_chosen():
    def chosen(mode, q_len, stride, block_size=32):
        return pattern_block_mask(mode, q_len, 4, block_size, stride).tiles().tile_q

    assert chosen("all", 4096, 128) == 128
    assert chosen("fixed", 4096, 128) == 128  # a window of queries shares its keys
    assert chosen("strided", 4096, 128) == 32  # residues of 32 rows share no key
    # Blocks read by a tile of 32, 64, 128 queries:
    assert chosen("local", 4096, 64) == 32  # 3, 4, 6
    assert chosen("local", 4096, 128) == 64  # 5, 6, 8
    assert chosen("local", 4096, 1024) == 128  # 33, 34, 36


def test_tile_arrays_are_what_kernels_read():
    """In order in memory too, be it one block or many."""
    for mask, layout in itertools.product(
        (masks.causal_mask(), None), (np.eye(2), np.ones([2, 2]))
    ):
        block_mask = BlockMask(layout, mask, 8)
        for tiles in block_mask.tiles(8), block_mask.tiles(16), block_mask.kv_tiles(32):
            *lists, mask_bits = (x for x in tiles if isinstance(x, np.ndarray))
            assert {array.dtype for array in lists} == {np.dtype(np.int32)}
            assert mask_bits.dtype == np.uint8
            assert all(array.flags.c_contiguous for array in (*lists, mask_bits))
        assert block_mask.tiles(8).mask_bits.shape[1:] == (8, 1)


# ---- errors ----


@pytest.mark.parametrize("tile_q", [8, 24, 48, 256, "32"])
def test_tiles_name_a_size_that_does_not_fit(tile_q):
    block_mask = BlockMask(np.ones([2, 2]), block_size=16)
    with pytest.raises(ValueError, match=r"one of \[16, 32, 64, 128\], got"):
        block_mask.tiles(tile_q)


def test_kv_tiles_name_what_does_not_fit():
    block_mask = BlockMask(np.ones([4, 2, 2]), block_size=16)
    for tile_kv in 16, 48, 256:
        with pytest.raises(ValueError, match=r"one of \[32, 64, 128\], got"):
            block_mask.kv_tiles(tile_kv)
    with pytest.raises(ValueError, match="group must divide heads=4, got 3"):
        block_mask.kv_tiles(32, group=3)
