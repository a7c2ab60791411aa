"""The table of patterns, and what it makes of its arguments."""

import doctest
import itertools
import json

import numpy as np
import pytest
from new_patterns import NEW_PATTERNS, new_rule

from sparse_attention.plan import block_mask, checks, masks, patterns
from sparse_attention.plan.patterns import (
    PATTERNS,
    layer_patterns,
    pattern_block_mask,
    resolve,
)

SIZES = {"q_len": 75, "heads": 4, "block_size": 8, "local_attn_ctx": 16, "num_verts": 2}


@pytest.fixture(autouse=True)
def more_patterns(monkeypatch):
    for name, pattern in NEW_PATTERNS.items():
        monkeypatch.setitem(PATTERNS, name, pattern)


@pytest.mark.parametrize("q_len", [1, 8, 31, 96, 100])
@pytest.mark.parametrize("ctx", [1, 8, 16, 40, 200])
@pytest.mark.parametrize("block_size", [8, 32])
def test_patterns_follow_the_rules(q_len, ctx, block_size):
    rules = {
        "all": lambda i, j: j <= i,
        "local": lambda i, j: 0 <= i - j < ctx,
        "strided": lambda i, j: j <= i and (i - j) % ctx == 0,
    }
    for mode, rule in rules.items():
        dense = pattern_block_mask(mode, q_len, 4, block_size, ctx).to_dense()
        expected = [[rule(i, j) for j in range(q_len)] for i in range(q_len)]
        np.testing.assert_array_equal(dense, [expected], mode)


@pytest.mark.parametrize("num_verts, vertsize", [(None, None), (2, 2), (1, 4), (1, 1)])
def test_fixed_pattern_follows_the_rule(num_verts, vertsize):
    dense = pattern_block_mask("fixed", 100, 8, 8, 32, num_verts, vertsize).to_dense()
    num_verts, vertsize = num_verts or 4, vertsize or 1
    assert len(dense) == 8
    for head, i, j in np.ndindex(8, 100, 100):
        end = 4 - vertsize * (head % num_verts)
        is_summary = end - vertsize <= j % 32 // 8 < end
        assert dense[head, i, j] == (j <= i and (i // 32 == j // 32 or is_summary))


def test_equal_arguments_give_one_plan():
    first = pattern_block_mask("fixed", 256, 4, 32, 128)
    assert pattern_block_mask("fixed", 256, 4, 32, 128) is first
    assert pattern_block_mask("fixed", 256, 8, 32, 128) is not first


def test_a_stride_beyond_the_sequence_costs_nothing():
    block_mask = pattern_block_mask("strided", 20, 1, 8, local_attn_ctx=10**9)
    np.testing.assert_array_equal(block_mask.to_dense(), [np.eye(20, dtype=bool)])


@pytest.mark.parametrize("attn_mode", NEW_PATTERNS)
def test_a_new_pattern_is_its_rule(attn_mode):
    for q_len, block_size, window in (76, 8, 24), (40, 16, 7), (8, 8, 16), (96, 32, 64):
        got = pattern_block_mask(attn_mode, q_len, 4, block_size, window).to_dense()
        want = new_rule(attn_mode, q_len, 4, window)
        np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)


def test_every_pattern_is_causal():
    for attn_mode in PATTERNS:
        dense = pattern_block_mask(attn_mode, 64, 4, 8, 32).to_dense()
        assert dense.any(axis=2).all() and not np.triu(dense, 1).any()


# ---- arguments ----


@pytest.mark.parametrize("attn_mode", [*PATTERNS, *NEW_PATTERNS])
def test_numpys_integers_are_pythons(attn_mode):
    sizes = {**SIZES, "q_len": 80}
    plan = pattern_block_mask(attn_mode, **sizes)
    wide = {name: np.int64(size) for name, size in sizes.items()}
    assert pattern_block_mask(attn_mode, **wide) is plan
    _, settings = resolve(attn_mode, **wide)
    assert {type(size) for size in settings} <= {int, type(None)}
    json.dumps(settings)


@pytest.mark.parametrize(
    "size", [8.0, "8", True, 0, -8, np.float32(8), np.array(8), np.array([8])]
)
@pytest.mark.parametrize("name", SIZES)
def test_no_other_number_is_taken_for_one_that_is_known(name, size):
    sizes = {**SIZES, name: 8, "num_verts": 1}
    pattern_block_mask("fixed", **sizes)
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got"):
        pattern_block_mask("fixed", **{**sizes, name: size})


@pytest.mark.parametrize(
    "args, message",
    [
        (("sideways", 64, 4), "attn_mode must be 'all', .*, got 'sideways'"),
        (
            ("dense", 64, 4),
            "'fixed', 'merged', 'dilated' or 'other_rows', got 'dense'",
        ),
        ((["all"], 64, 4), r"attn_mode must be .*, got \['all'\]"),
        ((None, 64, 4), "attn_mode must be .*, got None"),
        (("all", 0, 4), "q_len must be a positive integer, got 0"),
        (("all", 64, -1), "heads must be a positive integer, got -1"),
        (
            ("all", 64, 4, 24),
            r"block_size must be one of \[8, 16, 32, 64, 128\], got 24",
        ),
        (("all", 64, 4, 256), "block_size must be one of .*, got 256"),
        (("all", 64, 4, 0), "block_size must be a positive integer, got 0"),
        (("local", 64, 4, 32), "local_attn_ctx must be a positive integer, got None"),
        (("strided", 64, 4, 32, 0), "local_attn_ctx must be .*, got 0"),
        (("fixed", 64, 4, 32, -128), "local_attn_ctx must be .*, got -128"),
        (("fixed", 64, 4, 32, 100), "local_attn_ctx.* multiple of .*=32, got 100"),
        (
            ("fixed", 64, 6, 32, 128, 4),
            "heads must be a multiple of num_verts=4, got 6; num_verts=1",
        ),
        (("fixed", 64, 4, 32, 128, 1, 3), "vertsize must divide .* 4 blocks .*, got 3"),
        (("fixed", 64, 4, 32, 128, 4, 2), r"num_verts \* vertsize .* num_verts=1"),
    ],
)
def test_patterns_name_what_does_not_fit(args, message):
    with pytest.raises(ValueError, match=message):
        pattern_block_mask(*args)


def test_what_a_pattern_does_not_need_does_not_matter():
    plan = pattern_block_mask("all", 64, 4, 8)
    assert pattern_block_mask("all", 64, 4, 8, 0, 3, 2) is plan
    local = pattern_block_mask("local", 64, 4, 8, 16)
    assert pattern_block_mask("local", 64, 4, 8, 16, 3, 2) is local


def test_another_pattern_of_the_same_name_is_another_plan(monkeypatch):
    before = pattern_block_mask("local", 64, 4, 8, 16)
    monkeypatch.setitem(PATTERNS, "local", PATTERNS["all"]._replace(needs=()))
    assert pattern_block_mask("local", 64, 4, 8, 16) is not before
    monkeypatch.undo()
    assert pattern_block_mask("local", 64, 4, 8, 16) is before


def test_defaults_have_one_home(monkeypatch):
    plan = pattern_block_mask("fixed", 64, 4, 8, 32)
    assert plan is pattern_block_mask("fixed", 64, 4, 8, 32, 4, 1)
    monkeypatch.setattr(masks, "NUM_VERTS", 2)
    monkeypatch.setattr(patterns, "VERTSIZE", 2)
    assert pattern_block_mask("fixed", 64, 4, 8, 32) is not plan
    assert (
        pattern_block_mask("fixed", 64, 4, 8, 32).mask.name == "fixed_mask(32, 8, 2, 2)"
    )


def test_layers_take_turns_by_name():
    assert layer_patterns("fixed") == ["fixed"]
    assert layer_patterns(" dense,dilated , strided") == ["all", "dilated", "strided"]
    with pytest.raises(ValueError, match="attn_mode must be .* got ''"):
        layer_patterns("local,")
    with pytest.raises(TypeError, match=r"attention must be a str, .* got \['all'\]"):
        layer_patterns(["all"])


# ---- positions ----


MASKS = (
    masks.causal_mask(),
    masks.local_mask(7),
    masks.strided_mask(2),
    masks.strided_mask(3) | masks.sink_mask(4),
    masks.chunk_mask(5),
    masks.fixed_mask(4, 2, num_verts=2),
)


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_a_mask_in_positions_is_the_mask_in_rows(mask):
    for row_stride, visits, size in itertools.product(
        (1, 2, 3, 5), range(1, 8), range(1, 10)
    ):
        length = row_stride * visits
        order = [n * row_stride + b for b in range(row_stride) for n in range(visits)]
        positions = np.arange(length)
        want = mask(1, positions[:, None], positions)[np.ix_(order, order)]
        got = block_mask.in_positions(mask, length, row_stride)
        np.testing.assert_array_equal(got(1, positions[:, None], positions), want)
        first = np.arange(0, length, size)
        last = np.minimum(first + size, length) - 1
        q, kv = masks.Span(first[:, None], last[:, None]), masks.Span(first, last)
        all_true, none_true = got.bounds(1, q, kv)
        trues = np.add.reduceat(np.add.reduceat(want.astype(int), first, 0), first, 1)
        sizes = (last - first + 1)[:, None] * (last - first + 1)
        assert not (all_true & (trues < sizes)).any()
        assert not (none_true & (trues > 0)).any()


def test_bounds_in_positions_decide_what_rows_decide():
    """Blocks of one residue, which nearly all are, are decided; else plans take longer."""
    mask = block_mask.in_positions(masks.strided_mask(4), 128, 4)  # chunks of 32
    first = np.arange(0, 128, 8)
    q, kv = masks.Span(first[:, None], first[:, None] + 7), masks.Span(first, first + 7)
    all_true, none_true = mask.bounds(0, q, kv)
    chunk, number = first // 32, first
    same = chunk[:, None] == chunk
    np.testing.assert_array_equal(all_true, same & (number[:, None] > number))
    np.testing.assert_array_equal(none_true, ~same | (number[:, None] < number))


@pytest.mark.parametrize("module", [patterns, checks])
def test_docstrings_run(module, monkeypatch):
    monkeypatch.undo()  # the errors list the patterns
    assert doctest.testmod(module).attempted
    assert not doctest.testmod(module).failed


@pytest.mark.parametrize(
    "heads, ctx, vertsize, columns",
    [(1, 128, 1, 1), (2, 128, 1, 2), (3, 128, 1, 3), (6, 128, 1, 3), (5, 128, 1, 1)]
    + [(4, 128, 1, 4), (8, 256, 1, 4), (4, 64, 1, 2), (4, 32, 1, 1), (8, 128, 2, 2)],
)
def test_fixed_chooses_columns_that_fit(heads, ctx, vertsize, columns):
    sizes = (256, heads, 32, ctx)
    plan = pattern_block_mask("fixed", *sizes, vertsize=vertsize)
    assert plan is pattern_block_mask("fixed", *sizes, columns, vertsize)
