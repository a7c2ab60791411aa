"""Neighbourhoods, rows and columns against their rules in coordinates, and drawings."""

import doctest

import numpy as np
import pytest
from helpers import assert_plan_follows, drawn, elements
from hypothesis import given
from hypothesis import strategies as st

from sparse_attention.plan import images
from sparse_attention.plan.images import (
    merged_layout,
    merged_mask,
    neighborhood_layout,
    neighborhood_mask,
    row_column_layout,
    row_column_mask,
)
from sparse_attention.plan.masks import Span

BLOCK_SIZES = st.sampled_from([8, 16, 32])


def keys_of(mask, query, height, width, head=0):
    """The keys of a query, drawn as the image that they are in."""
    return drawn(mask(head, query, np.arange(height * width)).reshape(height, width))


@pytest.mark.parametrize(
    "mask, query, drawing",
    [
        (neighborhood_mask([4, 5], 1), 7, ".111. .111. .111. ....."),
        (neighborhood_mask([4, 5], 1), 5, "11... 11... 11... ....."),
        (neighborhood_mask([4, 5], 1), 19, "..... ..... ...11 ...11"),
        (neighborhood_mask([4, 5], [0, 2]), 7, "..... 11111 ..... ....."),
        (neighborhood_mask([4, 5], [2, 0]), 7, "..1.. ..1.. ..1.. ..1.."),
        (neighborhood_mask([4, 5], 0), 7, "..... ..1.. ..... ....."),
        (neighborhood_mask([4, 5], 1, causal=True), 7, ".111. .11.. ..... ....."),
        (merged_mask(5), 12, "..1.. ..111 111.. ....."),
    ],
)
def test_the_keys_of_a_query_match_their_drawing(mask, query, drawing):
    assert keys_of(mask, query, 4, 5) == drawing


def test_even_heads_see_rows_and_odd_heads_columns():
    mask = row_column_mask(5)
    for head in 0, 2:
        assert keys_of(mask, 12, 4, 5, head) == "..... ...11 111.. ....."
    for head in 1, 3:
        assert keys_of(mask, 12, 4, 5, head) == "..1.. ..1.. ..1.. ....."


def test_a_video_has_neighbours_in_time():
    mask = neighborhood_mask([3, 3, 3], [1, 1, 0])
    keys = mask(0, 3 * 3 + 4, np.arange(27)).reshape(3, 3, 3)  # the middle of frame 1
    assert [drawn(frame) for frame in keys] == [".1. .1. .1."] * 3
    causal = neighborhood_mask([3, 3, 3], [1, 1, 0], causal=True)
    keys = causal(0, 3 * 3 + 4, np.arange(27)).reshape(3, 3, 3)
    assert [drawn(frame) for frame in keys] == [
        ".1. .1. .1.",
        ".1. .1. ...",
        "... ... ...",
    ]


def test_layouts_match_their_drawings():
    assert drawn(neighborhood_layout([4, 8], 8, 1)[0]) == "11.. 111. .111 ..11"
    causal = neighborhood_layout([4, 8], 8, 1, causal=True)
    assert drawn(causal[0]) == "1... 11.. .11. ..11"
    assert drawn(neighborhood_layout([2, 2, 8], 8, [1, 0, 0])[0]) == (
        "1.1. .1.1 1.1. .1.1"
    )
    rows, columns = row_column_layout(48, 8, 16)
    assert drawn(rows) == "1..... 11.... 111... .111.. ..111. ...111"
    assert drawn(columns) == "1..... .1.... 1.1... .1.1.. 1.1.1. .1.1.1"
    np.testing.assert_array_equal(merged_layout(48, 8, 16)[0], rows | columns)
    assert drawn(merged_layout(48, 8, 16)[0]) == (
        "1..... 11.... 111... .111.. 1.111. .1.111"
    )


@given(
    BLOCK_SIZES,
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.data(),
    st.booleans(),
)
def test_a_neighborhood_is_its_rule(block_size, shape, data, causal):
    radii = [data.draw(st.integers(0, 3)) for _ in shape]
    place = list(np.ndindex(*shape))  # in raster order

    def rule(head, i, j):
        distances = [abs(a - b) for a, b in zip(place[i], place[j])]
        is_near = all(d <= radius for d, radius in zip(distances, radii))
        return is_near and (j <= i or not causal)

    layout = neighborhood_layout(shape, block_size, radii, causal)
    mask = neighborhood_mask(shape, radii, causal)
    assert_plan_follows(rule, layout, mask, block_size, len(place))


@given(BLOCK_SIZES, st.integers(1, 80), st.integers(1, 30), st.integers(1, 2))
def test_rows_and_columns_are_their_rule(block_size, q_len, width, times):
    def is_row(i, j):
        return 0 <= i - j < width

    def is_column(i, j):
        return j <= i and i % width == j % width

    assert_plan_follows(
        lambda head, i, j: is_column(i, j) if head % 2 else is_row(i, j),
        row_column_layout(q_len, block_size, width, 2 * times),
        *(row_column_mask(width), block_size, q_len),
    )
    assert_plan_follows(
        lambda head, i, j: is_row(i, j) or is_column(i, j),
        merged_layout(q_len, block_size, width, times),
        *(merged_mask(width), block_size, q_len),
    )


@pytest.mark.parametrize(
    "mask, q, kv, expected",
    [
        (neighborhood_mask([9, 8], 1), Span(8, 15), Span(24, 31), (False, True)),
        (neighborhood_mask([9, 8], 1), Span(8, 15), Span(16, 23), (False, False)),
        (neighborhood_mask([9, 8], 7), Span(8, 15), Span(16, 23), (True, False)),
        (neighborhood_mask([9, 16], 4), Span(0, 3), Span(17, 20), (True, False)),
        (neighborhood_mask([9, 16], 4), Span(0, 3), Span(24, 31), (False, True)),
        (neighborhood_mask([9, 16], 4), Span(12, 19), Span(24, 31), (False, False)),
        (neighborhood_mask([9, 4, 4], 1), Span(0, 3), Span(8, 11), (False, True)),
        (
            neighborhood_mask([9, 4, 4], [8, 0, 3]),
            Span(0, 3),
            Span(16, 19),
            (True, False),
        ),
        (neighborhood_mask([9, 4, 4], 3), Span(4, 7), Span(52, 55), (True, False)),
        (row_column_mask(16), Span(16, 23), Span(8, 15), (True, False)),
        (row_column_mask(16), Span(32, 39), Span(0, 7), (False, True)),
    ],
)
def test_bounds_decide_what_they_can(mask, q, kv, expected):
    assert tuple(map(bool, mask.bounds(0, q, kv))) == expected


def test_names_show_how_masks_are_made():
    assert repr(neighborhood_mask((4, 5), 1)) == "neighborhood_mask([4, 5], 1)"
    shown = repr(neighborhood_mask([4, 5], [1, 2], causal=True))
    assert shown == "neighborhood_mask([4, 5], [1, 2], causal=True)"
    assert repr(row_column_mask(4)) == "row_column_mask(4)"
    assert repr(merged_mask(4)) == "merged_mask(4)"
    assert row_column_mask(4).per_head is True and merged_mask(4).per_head is False


def test_the_first_axis_goes_on():
    """So one mask serves images of any height, and the blocks' ends."""
    np.testing.assert_array_equal(
        elements(neighborhood_mask([2, 5], 1), 30),
        elements(neighborhood_mask([6, 5], 1), 30),
    )


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: neighborhood_mask([4, 0], 1),
            "shape must be a positive integer, got 0",
        ),
        (lambda: neighborhood_mask([4, 4], -1), "radius must be 0 or a positive .* -1"),
        (lambda: neighborhood_mask([4, 4], 0.5), "radius must be 0 or .*, got 0.5"),
        (
            lambda: neighborhood_mask([4, 4], [1, 2, 3]),
            r"one for each axis of shape=\[4, 4\], got \[1, 2, 3\]",
        ),
        (lambda: neighborhood_mask(4, 1), "shape must be a list of integers, got 4"),
        (lambda: neighborhood_layout(4, 8, 1), "shape must be a list of .*, got 4"),
        (lambda: neighborhood_mask([4], None), "radius must be a list .*, got None"),
        (lambda: neighborhood_mask([], 1), r"axis of shape=\[\], got 1"),
        (lambda: neighborhood_layout([4, 4], 0, 1), "block_size must be .*, got 0"),
        (lambda: row_column_mask(0), "width must be a positive integer, got 0"),
        (
            lambda: row_column_layout(64, 8, 16, heads=3),
            r"heads must be a multiple of len.\[row, column\].=2, got 3",
        ),
        (lambda: merged_mask(-1), "stride must be a positive integer, got -1"),
    ],
)
def test_what_does_not_fit_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_docstrings_run():
    assert doctest.testmod(images).attempted
    assert not doctest.testmod(images).failed
