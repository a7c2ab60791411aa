"""The order in which attention_bwd_sm90 adds up dq: it comes to an end, whatever a plan holds.

A simulation of attention_bwd_ranks.cu and of who waits for whom, in units of one passing
block: `workers` CTAs at a time, each of which draws the next tile to start. Heads start in
turns, their first tiles first, or one after the other, their last tiles first (`from_last`).
"""

import numpy as np
import pytest

from sparse_attention.plan.patterns import pattern_block_mask

HEADS = 16  # kHeads of attention_bwd_sm90.cuh


def copy_plan(indptr, indices, blocks, from_last=False):
    """[[(block, rank)]] for each tile of one head, as attention_bwd_ranks copies them."""
    counts, copied, lists = np.zeros(blocks, int), 0, {}
    for tile in in_order(range(len(indptr) - 1), from_last):
        begin, end = np.clip(indptr[tile], 0, None), min(indptr[tile + 1], len(indices))
        length = max(end - begin, 0)
        copied += length
        if copied > len(indices):
            length = 0
        lists[tile], seen = [], set()
        for block in indices[begin : begin + length]:
            if 0 <= block < blocks and block not in seen:
                seen.add(block)
                lists[tile].append((block, counts[block]))
                counts[block] += 1
    return [lists[tile] for tile in range(len(indptr) - 1)]


def in_order(tiles, from_last):
    return tiles[::-1] if from_last else tiles


def simulate(lists, blocks, workers, heads=1, from_last=False):
    """Steps until all tiles of all heads are done; AssertionError where no CTA can go on.

    A CTA computes an entry in a step, and adds it in the same one if it is its turn.
    `lists` are those of every head, or a tuple of each head's.
    """
    of_heads = lists if isinstance(lists, tuple) else (lists,) * heads
    lists = of_heads[0]
    together = 1 if from_last else HEADS
    waiting = [
        (head, tile)
        for first in range(0, heads, together)
        for tile in in_order(range(len(lists)), from_last)
        for head in range(first, min(first + together, heads))
    ]
    # As a CTA goes through them.
    entries = [
        [entries if from_last else entries[::-1] for entries in lists]
        for lists in of_heads
    ]
    counts, steps, running = np.zeros((heads, blocks), int), 0, []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append([*waiting.pop(0), 0])
        added = [
            cta
            for cta in running
            if cta[2] == len(entries[cta[0]][cta[1]]) or _has_turn(cta, entries, counts)
        ]
        assert added, "all CTAs wait"
        for cta in added:
            head, tile, at = cta
            if at < len(entries[head][tile]):
                counts[head, entries[head][tile][at][0]] += 1
            cta[2] += 1
        running = [cta for cta in running if cta[2] < len(entries[cta[0]][cta[1]])]
        steps += 1
    return steps, counts


def _has_turn(cta, entries, counts):
    head, tile, at = cta
    block, rank = entries[head][tile][at]
    assert counts[head, block] <= rank
    return counts[head, block] == rank


def head_of(kv_tiles):
    return np.asarray(kv_tiles.q_indptr), np.asarray(kv_tiles.q_indices)


@pytest.mark.parametrize("from_last", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 7, 132])
@pytest.mark.parametrize("mode", ["all", "local", "strided", "fixed"])
def test_every_addition_has_its_turn(mode, workers, from_last):
    block_mask = pattern_block_mask(mode, 2048, 1, 32, 256, num_verts=1)
    indptr, indices = head_of(block_mask.kv_tiles(128, 1))
    blocks = block_mask.q_blocks
    lists = copy_plan(indptr, indices, blocks, from_last)
    steps, counts = simulate(lists, blocks, workers, 3, from_last)
    assert (counts == np.bincount(indices, minlength=blocks)).all()
    assert steps >= max(map(len, lists))


@pytest.mark.parametrize("from_last", [False, True])
@pytest.mark.parametrize("workers", [1, 7, 132])
def test_lists_that_a_rule_leaves_have_ranks_of_their_own(workers, from_last):
    """Of each sequence others are left, of some tiles none."""
    block_mask = pattern_block_mask("all", 2048, 1, 32, None)
    indptr, indices = head_of(block_mask.kv_tiles(128, 1))
    blocks, left, added = block_mask.q_blocks, [], []
    for sequence in range(3):
        documents = np.sort(np.random.RandomState(sequence).randint(0, 4, blocks))
        of_tiles = documents.reshape(len(indptr) - 1, -1)
        lists = [indices[a:b] for a, b in zip(indptr, indptr[1:])]
        lists = [
            list_[np.isin(documents[list_], tile)] if i % 5 else list_[:0]
            for i, (list_, tile) in enumerate(zip(lists, of_tiles))
        ]
        ends = np.cumsum([0, *map(len, lists)])
        entries = np.concatenate(lists)
        left.append(copy_plan(ends, entries, blocks, from_last))
        added.append(np.bincount(entries, minlength=blocks))
    _, counts = simulate(tuple(left), blocks, workers, 3, from_last)
    assert (counts == added).all()


@pytest.mark.parametrize("from_last", [False, True])
def test_tiles_of_one_head_fall_one_step_behind_each_other(from_last):
    block_mask = pattern_block_mask("all", 4096, 1, 128, None)
    head, blocks = head_of(block_mask.kv_tiles(128, 1)), block_mask.q_blocks
    lists = copy_plan(*head, blocks, from_last)
    steps, _ = simulate(lists, blocks, len(lists), from_last=from_last)
    assert steps == len(lists) == max(map(len, lists))


@pytest.mark.parametrize("mode, bound", [("all", 1.01), ("fixed", 1.02)])
def test_sms_are_busy_to_the_end(mode, bound):
    """Heads that start in turns, their longest lists first: little time is waited away."""
    block_mask = pattern_block_mask(mode, 8192, 1, 64, 128, num_verts=1)
    lists = copy_plan(*head_of(block_mask.kv_tiles(128, 1)), block_mask.q_blocks)
    workers, heads = 132, 64
    steps, counts = simulate(lists, block_mask.q_blocks, workers, heads)
    assert steps * workers <= bound * counts.sum()


@pytest.mark.parametrize("seed", range(50))
def test_corrupt_plans_come_to_an_end(seed):
    """Lists that overlap, hold a block twice, or lie out of range."""
    random = np.random.RandomState(seed)
    tiles, blocks, entries = random.randint(1, 20, 3)
    indptr = random.randint(-3, entries + 3, tiles + 1)
    if seed % 2:
        indptr = np.sort(indptr)
    indices = random.randint(-2, blocks + 2, entries)
    workers = random.randint(1, tiles + 1)
    for from_last in (False, True):
        lists = copy_plan(indptr, indices, blocks, from_last)
        assert sum(map(len, lists)) <= entries
        simulate(lists, blocks, workers, from_last=from_last)
