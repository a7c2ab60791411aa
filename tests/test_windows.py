"""Windows against their rule, written out, and against drawings."""

import doctest
import time

import numpy as np
import pytest
from helpers import assert_plan_follows, drawn, elements
from hypothesis import given
from hypothesis import strategies as st

from sparse_attention.plan import masks, windows
from sparse_attention.plan.block_mask import BlockMask
from sparse_attention.plan.masks import Span
from sparse_attention.plan.windows import window_layout, window_mask


def in_window(i, j, left, right, dilation=1):
    steps, rest = divmod(j - i, dilation)
    return rest == 0 and -left <= steps <= right


def test_windows_match_their_drawings():
    drawings = {
        "11.... 111... 1111.. .1111. ..1111 ...111": window_mask(2, 1),
        "1.1... .1.1.. 1.1.1. .1.1.1 ..1.1. ...1.1": window_mask(1, 1, dilation=2),
        "1..... 11.... .11... ..11.. ...11. ....11": window_mask(1, 0),
        "111111 111111 .11111 ..1111 ...111 ....11": window_mask(1, None),
        "11.... 111... 1111.. 11111. 111111 111111": window_mask(None, 1),
        "111111 111111 111111 111111 111111 111111": window_mask(None, None),
        "1.1.1. .1.1.1 1.1.1. .1.1.1 1.1.1. .1.1.1": window_mask(None, None, 2),
    }
    for drawing, mask in drawings.items():
        assert drawn(elements(mask, 6)) == drawing, mask
    assert drawn(window_layout(80, 16, 16, 1)[0]) == "11... 111.. .111. ..111 ...11"
    by_head = window_layout(64, 16, 1, 0, dilation=[1, 32])
    assert drawn(by_head[0]) == "1... 11.. .11. ..11"
    assert drawn(by_head[1]) == "1... .1.. 1.1. .1.1"


@given(
    st.sampled_from([8, 16, 32]),
    st.integers(1, 90),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(1, 9),
)
def test_a_window_is_its_rule(block_size, q_len, left, right, dilation):
    layout = window_layout(q_len, block_size, left, right, dilation)
    assert_plan_follows(
        lambda head, i, j: in_window(i, j, left, right, dilation),
        *(layout, window_mask(left, right, dilation), block_size, q_len),
    )


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(1, 2),
)
def test_heads_take_turns_with_dilations(dilations, left, right, times):
    mask, heads = window_mask(left, right, dilations), times * len(dilations)
    layout = window_layout(50, 8, left, right, dilations, heads)
    assert len(layout) == heads
    assert mask.per_head is (len(set(dilations)) > 1)
    assert_plan_follows(
        lambda h, i, j: in_window(i, j, left, right, dilations[h % len(dilations)]),
        *(layout, mask, 8, 50),
    )
    layout = window_layout(50, 8, left, right, dilations)
    assert len(layout) == len(dilations)


def test_an_offset_lines_up_the_ends():
    assert drawn(elements(window_mask(1, 1, offset=2), 3, 5)) == ".111. ..111 ...11"
    dilated = elements(window_mask(1, 0, 2, offset=-1), 4, 3)
    assert drawn(dilated) == "... 1.. .1. 1.1"


def test_one_sided_windows_are_known_masks():
    for offset in 0, 5, -3:
        for one, other in [
            (window_mask(None, 0, offset=offset), masks.causal_mask(offset)),
            (window_mask(6, 0, offset=offset), masks.local_mask(7, offset)),
            (window_mask(None, 0, 4, offset), masks.strided_mask(4, offset)),
            (window_mask(None, None, offset=offset), masks.dense_mask()),
        ]:
            np.testing.assert_array_equal(
                elements(one, 30, 40), elements(other, 30, 40)
            )


@pytest.mark.parametrize(
    "mask, q, kv, expected",
    [
        (window_mask(15, 0), Span(8, 15), Span(0, 7), (True, False)),
        (window_mask(14, 0), Span(8, 15), Span(0, 7), (False, False)),
        (window_mask(1, 0), Span(8, 15), Span(0, 7), (False, False)),
        (window_mask(0, 99), Span(8, 15), Span(0, 7), (False, True)),
        (window_mask(0, 15), Span(0, 7), Span(8, 15), (True, False)),
        (window_mask(0, 14), Span(0, 7), Span(8, 15), (False, False)),
        (window_mask(99, 0), Span(0, 7), Span(8, 15), (False, True)),
        (window_mask(9, 9, dilation=64), Span(96, 103), Span(0, 7), (False, True)),
        (window_mask(9, 9, dilation=64), Span(64, 71), Span(0, 7), (False, False)),
        (window_mask(9, 9, dilation=4), Span(4, 32, 4), Span(0, 28, 4), (True, False)),
    ],
)
def test_bounds_decide_what_they_can(mask, q, kv, expected):
    assert tuple(map(bool, mask.bounds(0, q, kv))) == expected


def test_names_show_how_windows_are_made():
    assert repr(window_mask(3, None)) == "window_mask(3, None)"
    assert repr(window_mask(3, 4, [1, 2])) == "window_mask(3, 4, dilation=[1, 2])"
    assert repr(window_mask(3, 4, 2, 5)) == "window_mask(3, 4, dilation=2, offset=5)"


def test_a_window_at_65536_positions_looks_at_its_rim_alone():
    looked_at = []

    def spy(head, q_idx, kv_idx):
        looked_at.append(np.broadcast(q_idx, kv_idx).size)
        return True

    q_len, block_size = 65536, 64
    for mask, most in [(window_mask(128, 128), 3), (window_mask(64, 64, 2), 5)]:
        looked_at.clear()
        seen = mask & masks.Mask(spy, lambda head, q, kv: (True, False), per_head=False)
        start = time.perf_counter()
        BlockMask(window_layout(q_len, block_size, 128, 128), seen, block_size)
        assert time.perf_counter() - start < 3
        assert sum(looked_at) <= most * q_len * block_size


@pytest.mark.parametrize("build", [window_mask, lambda *a: window_layout(64, 8, *a)])
@pytest.mark.parametrize(
    "args, message",
    [
        ((-1, 0), "left must be 0 or a positive integer, got -1"),
        ((0, -2), "right must be 0 or a positive integer, got -2"),
        ((1.5, 0), "left must be 0 or a positive integer, got 1.5"),
        ((0, True), "right must be .*, got True"),
        ((1, 1, 0), "dilation must be a positive integer, got 0"),
        ((1, 1, [1, -2]), "dilation must be a positive integer, got -2"),
        ((1, 1, []), r"dilation must have a number for each head, got \[\]"),
        ((1, 1, None), "dilation must be a positive integer, got None"),
        ((1, 1, np.array(2.5)), r"dilation must be a list .*, got array\(2.5\)"),
        ((1, 1, "2"), "dilation must be a positive integer, got '2'"),
    ],
)
def test_windows_name_what_does_not_fit(build, args, message):
    with pytest.raises(ValueError, match=message):
        build(*args)


def test_heads_and_offset_are_checked():
    with pytest.raises(ValueError, match=r"a multiple of len\(dilation\)=2, got 3"):
        window_layout(64, 8, 1, 1, [1, 2], heads=3)
    with pytest.raises(ValueError, match="heads must be a positive integer, got 0"):
        window_layout(64, 8, 1, 1, heads=0)
    with pytest.raises(ValueError, match="offset must be an integer, got 0.5"):
        window_mask(1, 1, offset=0.5)


def test_docstrings_run():
    assert doctest.testmod(windows).attempted
    assert not doctest.testmod(windows).failed
