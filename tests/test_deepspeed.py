"""DeepSpeed's layouts: drawn, and block by block as its configurations describe them.

`benchmarks/deepspeed_patterns.py` compares them with DeepSpeed's own, block for block.
"""

import doctest
import random

import numpy as np
import pytest
from helpers import drawn
from hypothesis import given
from hypothesis import strategies as st

from sparse_attention.plan import deepspeed
from sparse_attention.plan.block_mask import BlockMask
from sparse_attention.plan.deepspeed import (
    deepspeed_bigbird_layout,
    deepspeed_bslongformer_layout,
    deepspeed_fixed_layout,
    deepspeed_variable_layout,
)
from sparse_attention.plan.masks import causal_mask

ONE_WAY = "unidirectional"
ATTENTIONS = st.sampled_from(["bidirectional", ONE_WAY])


def test_layouts_match_their_drawings():
    fixed, variable = deepspeed_fixed_layout, deepspeed_variable_layout
    longformer = deepspeed_bslongformer_layout
    two_heads = fixed(
        *(40, 8, 2, 2), num_different_global_patterns=2, different_layout_per_head=True
    )
    drawings = {
        "11.11 11.11 .1111 .1111 .1.11": fixed(40, 8, num_local_blocks=2)[0],
        "1.... 11... .11.. .111. .1.11": fixed(
            *(40, 8), num_local_blocks=2, attention=ONE_WAY
        )[0],
        "11.11 11111 .1111 11111 11111": fixed(
            *(40, 8), num_local_blocks=2, horizontal_global_attention=True
        )[0],
        "11111 11111 11111 11111 ..111": fixed(
            *(40, 8), num_local_blocks=4, num_global_blocks=2
        )[0],
        "111.1 111.1 1.111 1.111 1.1.1": two_heads[1],
        "1.... 111.. 111.. 1..11 1..11": variable(40, 8, local_window_blocks=[1, 2])[0],
        "11..1 11..1 ..111 ..111 ....1": variable(
            *(40, 8), local_window_blocks=[2], global_block_indices=[4, 9]
        )[0],
        "1111. 1111. 11111 11111 ..111": longformer(
            *(40, 8), global_block_indices=[2], global_block_end_indices=[4]
        )[0],
        "11111 111.. 1111. 1.111 1..11": longformer(40, 8)[0],
        "1.... 11... 111.. 1.11. 1..11": longformer(40, 8, attention=ONE_WAY)[0],
        "11111 11111 1111. 11111 11.11": deepspeed_bigbird_layout(
            *(40, 8), num_random_blocks=0, num_global_blocks=2
        )[0],
    }
    for drawing, layout in drawings.items():
        assert drawn(layout) == drawing


@given(
    st.integers(1, 20),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    ATTENTIONS,
    st.booleans(),
)
def test_fixed_is_its_rule(n, width, groups, patterns, attention, horizontal):
    """A window is `groups` times `width` blocks; head h has group h, from the end."""
    window, patterns = width * groups, min(patterns, groups)
    horizontal = horizontal and attention != ONE_WAY
    layout = deepspeed_fixed_layout(
        *(8 * n - 3, 8, 4, window, width, attention, horizontal, patterns),
        different_layout_per_head=patterns > 1,
    )
    for head in range(4):
        first = window - (1 + head % patterns) * width
        in_a_window = {
            block
            for block in range(n)
            if first <= block % window < first + width and block < n - n % window
        }
        start = n if n % window == 0 else min(n - n % window + first, n - width)
        chosen = in_a_window | set(range(start, start + width))
        for i, j in np.ndindex(n, n):
            want = i // window == j // window or j in chosen
            want = want or (horizontal and i in chosen)
            assert layout[head, i, j] == (want and (attention != ONE_WAY or j <= i))


@given(
    st.integers(1, 20),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 22), st.integers(1, 4)), max_size=3),
    ATTENTIONS,
    st.booleans(),
    st.integers(0, 2),
)
def test_variable_is_its_rule(n, sizes, ranges, attention, horizontal, count):
    count = min(count, n)
    horizontal = horizontal and attention != ONE_WAY
    starts, ends = [a for a, _ in ranges], [a + size for a, size in ranges]
    layout = deepspeed_variable_layout(
        *(8 * n, 8, 2, count, sizes, starts, ends, attention, horizontal),
        different_layout_per_head=True,
        seed=5,
    )
    window_of = [w for w, size in enumerate(sizes) for _ in range(size)]
    for w in range(len(sizes), n + len(sizes)):
        window_of += [w] * sizes[-1]
    is_global = [
        any(a <= block < b for a, b in zip(starts, ends)) for block in range(n)
    ]
    draws = random.Random(5)
    for head in range(2):
        for i in range(n):
            drawn_blocks = draws.sample(range(n), count)
            for j in range(n):
                want = window_of[i] == window_of[j] or is_global[j] or j in drawn_blocks
                want = want or (horizontal and is_global[i])
                assert layout[head, i, j] == (want and (attention != ONE_WAY or j <= i))


@given(
    st.integers(3, 20),
    st.integers(1, 3),
    st.lists(st.integers(0, 22), max_size=3),
    ATTENTIONS,
)
def test_bslongformer_is_its_rule(n, window, indices, attention):
    layout = deepspeed_bslongformer_layout(
        *(8 * n, 8, 2, window, indices), attention=attention
    )
    assert len(layout) == 2
    for head, i, j in np.ndindex(2, n, n):
        want = abs(i - j) <= window // 2 or i in indices or j in indices
        assert layout[head, i, j] == (want and (attention != ONE_WAY or j <= i))


@given(
    st.integers(3, 20), st.integers(0, 3), st.integers(1, 3), ATTENTIONS, st.booleans()
)
def test_bigbird_is_its_rule(n, count, few, attention, by_head):
    layout = deepspeed_bigbird_layout(
        *(8 * n, 8, 2, count, few, few, attention, by_head), seed=7
    )
    assert by_head or (layout[0] == layout[1]).all()
    draws = random.Random(7)
    for head in range(1 + by_head):
        for i in range(n):
            choices = range(n) if attention != ONE_WAY else range(i + 1)
            drawn_blocks = draws.sample(choices, min(count, len(choices)))
            for j in range(n):
                want = abs(i - j) <= few // 2 or min(i, j) < few or j in drawn_blocks
                assert layout[head, i, j] == (want and (attention != ONE_WAY or j <= i))


def test_one_way_layouts_and_a_causal_mask_are_causal():
    layout = deepspeed_fixed_layout(60, 8, num_global_blocks=2, attention=ONE_WAY)
    dense = BlockMask(layout, causal_mask(), 8, 60, 60).to_dense()[0]
    want = layout[0].repeat(8, axis=0).repeat(8, axis=1)[:60, :60]
    np.testing.assert_array_equal(dense, np.tril(want))


def test_draws_are_nobody_elses():
    state = random.getstate()
    deepspeed_bigbird_layout(64, 8)
    assert random.getstate() == state


@pytest.mark.parametrize(
    "build, options, message",
    [
        (
            deepspeed_fixed_layout,
            {"num_local_blocks": 0},
            "num_local_blocks must be .* 0",
        ),
        (
            deepspeed_fixed_layout,
            {"num_global_blocks": 3},
            "num_global_blocks must divide num_local_blocks=4, got 3",
        ),
        (
            deepspeed_fixed_layout,
            {"num_different_global_patterns": 2},
            "must be 1 without different_layout_per_head=True, got 2",
        ),
        (
            deepspeed_fixed_layout,
            {"num_different_global_patterns": 5, "different_layout_per_head": True},
            "num_different_global_patterns must be at most 4, .*, got 5",
        ),
        (
            deepspeed_variable_layout,
            {"local_window_blocks": 4},
            "local_window_blocks must be a list of integers, got 4",
        ),
        (
            deepspeed_variable_layout,
            {"global_block_end_indices": 4},
            "global_block_end_indices must be a list of integers, got 4",
        ),
        (
            deepspeed_bslongformer_layout,
            {"global_block_indices": 0},
            "global_block_indices must be a list of integers, got 0",
        ),
        (
            deepspeed_variable_layout,
            {"local_window_blocks": []},
            "local_window_blocks must have a size, got none",
        ),
        (
            deepspeed_variable_layout,
            {"local_window_blocks": [2, 0]},
            "local_window_blocks must be a positive integer, got 0",
        ),
        (
            deepspeed_variable_layout,
            {"num_random_blocks": 9},
            "num_random_blocks must be at most the 8 blocks, got 9",
        ),
        (
            deepspeed_variable_layout,
            {"seed": -1},
            "seed must be 0 or a positive .*, got -1",
        ),
        (
            deepspeed_bslongformer_layout,
            {"num_sliding_window_blocks": 9},
            "num_sliding_window_blocks must be at most the 8 blocks, got 9",
        ),
        (
            deepspeed_bslongformer_layout,
            {"global_block_indices": [-1]},
            "global_block_indices must be 0 or a positive integer, got -1",
        ),
        (
            deepspeed_bslongformer_layout,
            {"global_block_end_indices": [1, 2]},
            "global_block_end_indices must have 1 numbers, .*, got 2",
        ),
        (
            deepspeed_bslongformer_layout,
            {"global_block_indices": [3], "global_block_end_indices": [3]},
            "global_block_end_indices must be above global_block_indices, got 3 for 3",
        ),
        (
            deepspeed_bigbird_layout,
            {"num_global_blocks": 9},
            "num_global_blocks must be at most the 8 blocks, got 9",
        ),
        (
            deepspeed_bigbird_layout,
            {"num_random_blocks": -1},
            "num_random_blocks must be 0 or a positive integer, got -1",
        ),
    ],
)
def test_what_does_not_fit_is_named(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(64, 8, **options)


@pytest.mark.parametrize(
    "build",
    [
        deepspeed_fixed_layout,
        deepspeed_variable_layout,
        deepspeed_bslongformer_layout,
        deepspeed_bigbird_layout,
    ],
)
def test_all_check_what_they_have_in_common(build):
    with pytest.raises(ValueError, match="heads must be a positive integer, got 0"):
        build(64, 8, heads=0)
    with pytest.raises(ValueError, match="attention must be .*, got 'causal'"):
        build(64, 8, attention="causal")
    if build in (deepspeed_fixed_layout, deepspeed_variable_layout):
        with pytest.raises(
            ValueError, match="horizontal_global_attention must be False"
        ):
            build(64, 8, attention=ONE_WAY, horizontal_global_attention=True)


def test_docstrings_run():
    assert doctest.testmod(deepspeed).attempted
    assert not doctest.testmod(deepspeed).failed
