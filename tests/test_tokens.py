"""A prefix, documents and global tokens against their rules, and against drawings."""

import doctest

import numpy as np
import pytest
from helpers import assert_plan_follows, drawn, elements
from hypothesis import given
from hypothesis import strategies as st

from sparse_attention.plan import tokens
from sparse_attention.plan.block_mask import BlockMask
from sparse_attention.plan.masks import Span
from sparse_attention.plan.tokens import (
    documents_layout,
    documents_mask,
    global_layout,
    global_mask,
    prefix_layout,
    prefix_mask,
)

BLOCK_SIZES = st.sampled_from([8, 16, 32])


def test_masks_and_layouts_match_their_drawings():
    drawings = {
        "11.. 11.. 111. 1111": prefix_mask(2),
        "1... 11.. 111. 1111": prefix_mask(1),
        "11.. 11.. ..1. ....": documents_mask([2, 1]),
        "1... 11.. ..1. ..11": documents_mask([2, 2], causal=True),
        "...1 ...1 ...1 1111": global_mask([3]),
        "1111 1.1. 1111 1.1.": global_mask([2, 0]),
        ".... .... .... ....": global_mask([]),
    }
    for drawing, mask in drawings.items():
        assert drawn(elements(mask, 4)) == drawing, mask
    assert drawn(prefix_layout(64, 16, 17)[0]) == "11.. 11.. 111. 1111"
    assert drawn(documents_layout(64, 16, [16, 48])[0]) == "1... .111 .111 .111"
    causal = documents_layout(64, 16, [20, 30], causal=True)
    assert drawn(causal[0]) == "1... 11.. .11. .111"
    assert drawn(global_layout(64, 16, [20])[0]) == ".1.. 1111 .1.. .1.."


@given(BLOCK_SIZES, st.integers(1, 80), st.integers(1, 90), st.integers(1, 2))
def test_a_prefix_is_its_rule(block_size, q_len, prefix, heads):
    layout = prefix_layout(q_len, block_size, prefix, heads)
    assert len(layout) == heads
    assert_plan_follows(
        lambda head, i, j: j <= i or (i < prefix and j < prefix),
        *(layout, prefix_mask(prefix), block_size, q_len),
    )


@given(
    BLOCK_SIZES,
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.integers(0, 20),
    st.booleans(),
)
def test_documents_are_their_rule(block_size, lengths, padding, causal):
    document_of = [n for n, length in enumerate(lengths) for _ in range(length)]
    document_of += [None] * padding

    def rule(head, i, j):
        is_same = document_of[i] is not None and document_of[i] == document_of[j]
        return is_same and (j <= i or not causal)

    q_len = len(document_of)
    layout = documents_layout(q_len, block_size, lengths, causal)
    assert_plan_follows(
        rule, layout, documents_mask(lengths, causal), block_size, q_len
    )


@given(BLOCK_SIZES, st.integers(1, 80), st.data())
def test_global_tokens_are_their_rule(block_size, q_len, data):
    places = st.lists(st.integers(0, q_len - 1), unique=True, max_size=12)
    positions = data.draw(places)
    layout = global_layout(q_len, block_size, positions)
    assert_plan_follows(
        lambda head, i, j: i in positions or j in positions,
        *(layout, global_mask(positions), block_size, q_len),
    )


def test_an_offset_of_a_prefix_moves_the_queries_alone():
    got = elements(prefix_mask(3, offset=2), 3, 6)
    np.testing.assert_array_equal(got, elements(prefix_mask(3), 6)[2:5])
    assert drawn(got) == "111... 1111.. 11111."
    assert repr(prefix_mask(3, offset=2)) == "prefix_mask(3, offset=2)"


@pytest.mark.parametrize(
    "mask, q, kv, expected",
    [
        (prefix_mask(8), Span(0, 7), Span(0, 7), (True, False)),
        (prefix_mask(7), Span(0, 7), Span(0, 7), (False, False)),
        (prefix_mask(8), Span(0, 7), Span(8, 15), (False, True)),
        (documents_mask([16, 16]), Span(0, 7), Span(8, 15), (True, False)),
        (documents_mask([16, 16]), Span(8, 15), Span(16, 23), (False, True)),
        (documents_mask([12, 20]), Span(8, 15), Span(16, 23), (False, False)),
        (documents_mask([16]), Span(16, 23), Span(16, 23), (False, True)),
        (documents_mask([16, 8], True), Span(0, 7), Span(8, 15), (False, True)),
        (global_mask(range(8)), Span(0, 7), Span(16, 23), (True, False)),
        (global_mask(range(8)), Span(16, 23), Span(0, 7), (True, False)),
        (global_mask(range(7)), Span(16, 23), Span(0, 7), (False, False)),
        (global_mask([9]), Span(0, 7), Span(16, 23), (False, True)),
        (global_mask([16]), Span(0, 7), Span(16, 23), (False, False)),
        (global_mask([]), Span(0, 7), Span(16, 23), (False, True)),
    ],
)
def test_bounds_decide_what_they_can(mask, q, kv, expected):
    assert tuple(map(bool, mask.bounds(0, q, kv))) == expected


def test_names_show_how_masks_are_made():
    assert repr(prefix_mask(3)) == "prefix_mask(3)"
    assert repr(documents_mask([3, 4], True)) == "documents_mask([3, 4], causal=True)"
    assert repr(documents_mask([1] * 9)) == "documents_mask([1, 1, 1, 1, ...])"
    assert repr(global_mask([7, 2])) == "global_mask([2, 7])"
    assert repr(global_mask(range(5))) == "global_mask([0, 1, 2, 3, ...])"


def test_arrays_of_lengths_and_positions_are_lists():
    np.testing.assert_array_equal(
        elements(documents_mask(np.array([3, 4])), 9),
        elements(documents_mask([3, 4]), 9),
    )
    chosen = np.array([0, 1, 0, 1], bool)
    np.testing.assert_array_equal(
        elements(global_mask(np.flatnonzero(chosen)), 4), chosen | chosen[:, None]
    )


def test_padding_attends_to_nothing():
    plan = BlockMask(np.ones([4, 4]), documents_mask([10, 5]), 8, 32, 32)
    dense = plan.to_dense()[0]
    assert dense[:15].any(axis=1).all()
    assert not dense[15:].any() and not dense[:, 15:].any()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: prefix_mask(0), "prefix must be a positive integer, got 0"),
        (lambda: prefix_mask(1, offset=0.5), "offset must be an integer, got 0.5"),
        (lambda: prefix_layout(64, 8, -1), "prefix must be .*, got -1"),
        (lambda: documents_mask(5), "lengths must be a list of integers, got 5"),
        (lambda: documents_layout(9, 8, None), "lengths must be a list .*, got None"),
        (lambda: documents_mask([]), "lengths must have a number for each document"),
        (lambda: documents_mask([3, 0]), "lengths must be a positive integer, got 0"),
        (lambda: documents_mask([3, 2.5]), "lengths must be .*, got 2.5"),
        (
            lambda: documents_layout(64, 8, [60, 5]),
            "lengths must add up to at most q_len=64, got 65",
        ),
        (lambda: global_mask([-1]), "positions must be a list of integers from 0 on"),
        (lambda: global_mask([0.5]), r"positions must be .*, got \[0.5\]"),
        (lambda: global_mask(3), "positions must be .*, got 3"),
        (lambda: global_mask([[1]]), r"positions must be .*, got \[\[1\]\]"),
        (
            lambda: global_mask(np.array([True, False])),
            "positions must be a list .*; np.flatnonzero gives them",
        ),
        (
            lambda: global_mask([1, 0, 0, 0]),  # a mask of zeros and ones
            "positions must name a position once, .* np.flatnonzero",
        ),
        (
            lambda: global_layout(64, 8, [64]),
            "positions must be below q_len=64, got 64",
        ),
        (lambda: global_layout(0, 8, [64]), "q_len must be a positive integer, got 0"),
    ],
)
def test_what_does_not_fit_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_docstrings_run():
    assert doctest.testmod(tokens).attempted
    assert not doctest.testmod(tokens).failed
