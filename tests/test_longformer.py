"""Longformer against its rule, written out, and against drawings."""

import doctest

import numpy as np
import pytest
from helpers import assert_plan_follows, drawn, elements
from hypothesis import given
from hypothesis import strategies as st

from sparse_attention.plan import longformer
from sparse_attention.plan.longformer import longformer_layout, longformer_mask
from sparse_attention.plan.masks import causal_mask


def test_longformer_matches_its_drawings():
    drawings = {
        "11... 111.. .111. ..111 ...11": longformer_mask(2),
        "11.1. 1111. .111. 11111 ...11": longformer_mask(2, [3]),
        "1.1.. .1.1. 1.1.1 .1.1. ..1.1": longformer_mask(2, dilation=2),
        "1.... 11... .11.. 1111. ...11": longformer_mask(2, [3]) & causal_mask(),
    }
    for drawing, mask in drawings.items():
        assert drawn(elements(mask, 5)) == drawing, mask
    layout = longformer_layout(80, 16, 2, [20], dilation=[1, 40])
    assert drawn(layout[0]) == "11... 11111 .111. .1111 .1.11"
    assert drawn(layout[1]) == "1111. 11111 111.1 11.1. .11.1"


@given(
    st.sampled_from([8, 16]),
    st.integers(1, 60),
    st.integers(1, 12),
    st.lists(st.integers(1, 4), min_size=1, max_size=2),
    st.data(),
)
def test_longformer_is_its_rule(block_size, q_len, side, dilations, data):
    places = st.lists(st.integers(0, q_len - 1), unique=True, max_size=4)
    chosen = data.draw(places)

    def rule(head, i, j):
        steps, rest = divmod(j - i, dilations[head % len(dilations)])
        return i in chosen or j in chosen or (rest == 0 and -side <= steps <= side)

    layout = longformer_layout(q_len, block_size, 2 * side, chosen, dilations)
    mask = longformer_mask(2 * side, chosen, dilations)
    assert_plan_follows(rule, layout, mask, block_size, q_len)


def test_names_show_how_masks_are_made():
    assert repr(longformer_mask(4)) == "longformer_mask(4)"
    assert repr(longformer_mask(4, [2])) == "longformer_mask(4, [2])"
    assert repr(longformer_mask(4, [9, 2], [1, 2])) == (
        "longformer_mask(4, [2, 9], dilation=[1, 2])"
    )
    by_array = longformer_mask(4, np.array([2]), np.array([1, 2]))
    assert repr(by_array) == "longformer_mask(4, [2], dilation=[1 2])"


@pytest.mark.parametrize(
    "args, message",
    [
        ((3,), "window must be even, half of it on each side, got 3"),
        ((0,), "window must be a positive integer, got 0"),
        ((4, [-1]), "global_positions must be a list of integers from 0 on"),
        ((4, [1, 0, 0]), "global_positions must name a position once"),
        ((4, [], 0), "dilation must be a positive integer, got 0"),
    ],
)
def test_what_does_not_fit_is_named(args, message):
    for build in longformer_mask, lambda *args: longformer_layout(64, 8, *args):
        with pytest.raises(ValueError, match=message):
            build(*args)


def test_layouts_check_heads_and_lengths():
    with pytest.raises(ValueError, match=r"multiple of len\(dilation\)=2, got 3"):
        longformer_layout(64, 8, 4, dilation=[1, 2], heads=3)
    with pytest.raises(ValueError, match="global_positions must be below q_len=64"):
        longformer_layout(64, 8, 4, [64])


def test_docstrings_run():
    assert doctest.testmod(longformer).attempted
    assert not doctest.testmod(longformer).failed
