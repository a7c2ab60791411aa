"""BigBird's blocks: drawn, counted, and where random ones may lie.

`benchmarks/huggingface_patterns.py` compares them with Hugging Face's own, block for block.
"""

import doctest

import numpy as np
import pytest
from helpers import drawn
from hypothesis import given
from hypothesis import strategies as st

from sparse_attention.plan import bigbird
from sparse_attention.plan.bigbird import bigbird_layout
from sparse_attention.plan.block_mask import BlockMask


def own_blocks(n):
    """The blocks that are no random ones, written out."""
    ends = (0, n - 1)
    return np.array(
        [
            [i in ends or j in ends or abs(i - j) <= 1 for j in range(n)]
            for i in range(n)
        ]
    )


def test_bigbird_matches_its_drawings():
    without = bigbird_layout(48, 8, random_blocks=0)[0]
    assert drawn(without) == "111111 111..1 1111.1 1.1111 1..111 111111"
    layout = bigbird_layout(64, 8, random_blocks=1, heads=2)
    assert drawn(layout[0]) == (
        "11111111 1111...1 1111.1.1 1.1111.1 11.111.1 1..11111 1.1..111 11111111"
    )
    assert drawn(layout[1]) == (
        "11111111 1111...1 1111.1.1 11111..1 1.1111.1 1..11111 1...1111 11111111"
    )


@given(
    st.sampled_from([8, 16, 64]),
    st.integers(1, 40),
    st.integers(0, 4),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_every_block_has_its_own_and_so_many_at_random(size, n, count, heads, seed):
    layout = bigbird_layout(n * size - 3, size, count, heads, seed)
    assert layout.shape == (heads, n, n)
    if n <= 5 + 2 * count:
        assert layout.all()
        return
    own = own_blocks(n)
    assert (layout | ~own).all()
    random = layout & ~own
    inner = random[:, 1:-1].sum(axis=2)
    if n * size in (1024, 3072, 4096):
        assert (inner <= count).all()  # some may be the last block
    else:
        assert (inner == count).all()
    again = bigbird_layout(n * size, size, count, heads, seed)
    np.testing.assert_array_equal(again, layout)


@pytest.mark.parametrize("q_len", [1024, 2048, 3072, 4096, 8192])
def test_random_blocks_lie_where_hugging_faces_do(q_len):
    layout = bigbird_layout(q_len, 64, random_blocks=3, heads=4, seed=1)
    random = layout & ~own_blocks(q_len // 64)
    is_papers = q_len in (1024, 3072, 4096)
    assert np.flatnonzero(random.any(axis=(0, 1))).max() <= (15 if is_papers else 9)
    assert random.any(axis=1).sum(axis=1).min() > 6  # and nearly everywhere there


# What `BigBirdBlockSparseAttention` of transformers 5.24.0 drew for the rows but the ends:
# q_len, block_size, random_blocks, heads, seed, max_len.
HUGGING_FACES = {
    (192, 16, 3, 2, 1, 4096): [
        "346 956 715 618 831 813 435 435 236 231",
        "738 584 798 682 231 231 453 321 273 163",
    ],
    (1024, 64, 2, 1, 0, 1024): ["9e 96 95 6c 2d 34 91 ac c2 35 47 7a 62 9d"],
    (1024, 128, 1, 1, 2, 4096): ["5 4 7 1 2 3"],
}


@pytest.mark.parametrize("args", HUGGING_FACES)
def test_random_blocks_are_hugging_faces(args):
    layout = bigbird_layout(*args)
    want = np.stack([own_blocks(layout.shape[1])] * len(layout))
    for head, rows in enumerate(HUGGING_FACES[args]):
        for row, blocks in enumerate(rows.split()):
            want[head, row + 1, [int(block, 16) for block in blocks]] = True
    np.testing.assert_array_equal(layout, want)


@pytest.mark.parametrize("count", [1, 2])
def test_the_second_blocks_from_the_ends_of_the_pool_leave_each_other_out(count):
    pool = 2 * count + 5
    layout = bigbird_layout(8 * (pool + 1), 8, count, heads=300)
    assert not layout[:, 1, pool - 2].any() and not layout[:, pool - 2, 1].any()
    free = np.ones(pool - 2, bool)
    free[[0, 1, -1]] = False  # blocks 1 and 2, its window, and pool - 2
    np.testing.assert_array_equal(layout[:, 1, 1 : pool - 1].any(axis=0)[2:], free[2:])


def test_seeds_and_heads_have_blocks_of_their_own():
    layouts = [bigbird_layout(1280, 64, heads=4, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(layouts[0], layouts[1])
    assert (layouts[0] != layouts[2]).any()
    assert all((layouts[0][0] != head).any() for head in layouts[0][1:])
    state = np.random.get_state()[1].copy()
    bigbird_layout(1280, 64)
    np.testing.assert_array_equal(
        np.random.get_state()[1], state
    )  # nobody else's draws


def test_max_len_matters_for_the_papers_lengths_alone():
    for q_len, differs in (1024, True), (2048, False):
        one, other = (bigbird_layout(q_len, 64, max_len=n) for n in (4096, 3072))
        assert (one != other).any() == False  # noqa: E712
        two_heads = [
            bigbird_layout(q_len, 64, heads=2, max_len=n) for n in (4096, 3072)
        ]
        assert (two_heads[0] != two_heads[1]).any() == differs


def test_the_plan_of_a_layout_needs_no_mask():
    layout = bigbird_layout(200, 16, random_blocks=2, heads=3)
    want = layout.repeat(16, axis=1).repeat(16, axis=2)[:, :200, :200]
    np.testing.assert_array_equal(
        BlockMask(layout, None, 16, 200, 200).to_dense(), want
    )


@pytest.mark.parametrize(
    "args, message",
    [
        ((0, 64), "q_len must be a positive integer, got 0"),
        ((640, 64, -1), "random_blocks must be 0 or a positive integer, got -1"),
        ((640, 64, 3, 0), "heads must be a positive integer, got 0"),
        ((640, 64, 3, 1, -1), "seed must be 0 or a positive integer, got -1"),
        ((4096, 64, 3, 1, 0, 2048), "max_len must be at least q_len=4096, got 2048"),
        ((3072, 128, 7), "random_blocks must be at most 4 .*=128, got 7"),
    ],
)
def test_what_does_not_fit_is_named(args, message):
    with pytest.raises(ValueError, match=message):
        bigbird_layout(*args)


def test_docstrings_run():
    assert doctest.testmod(bigbird).attempted
    assert not doctest.testmod(bigbird).failed
