"""The CPU kernels through the C ABI, on every instruction set of this machine."""

import itertools
import re

import nan_rule
import numpy as np
import pytest
from core_abi import InvalidArgument, plan_of
from core_case import Case, as_float, same_bits
from helpers import DTYPES, PATTERNS, RESULTS, cases, to_dtype
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention.plan import layouts
from sparse_attention.plan.block_mask import BlockMask
from sparse_attention.plan.patterns import pattern_block_mask

# ---- against the oracle ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attn_mode", PATTERNS)
def test_patterns_match_oracle(core, attn_mode, dtype):
    for block_size in (8, 16, 32, 64, 128):
        stride = 8 if attn_mode == "strided" else max(2 * block_size, 32)
        block_mask = pattern_block_mask(
            attn_mode, max(2 * block_size, 64) + 5, 2, block_size, stride, num_verts=2
        )
        Case(core, block_mask, dtype, head_dim=32).check(workers=2)


@pytest.mark.parametrize(
    "head_dim,head_dim_v",
    [(8, 8), (40, 24), (64, 128), (128, 64), (96, 96), (256, 256)],
)
def test_head_dims_match_oracle(core, head_dim, head_dim_v):
    block_mask = pattern_block_mask("local", 100, 2, 16, 24)
    for dtype in ("float32", "bfloat16"):
        Case(core, block_mask, dtype, head_dim=head_dim, head_dim_v=head_dim_v).check()


@pytest.mark.parametrize("tile_q", [16, 32, 64, 128])
def test_merged_q_tiles_match_oracle(core, tile_q):
    for attn_mode in ("strided", "fixed"):
        block_mask = pattern_block_mask(attn_mode, 150, 4, 16, 32, num_verts=2)
        Case(core, block_mask, heads=4, tile_q=tile_q).check()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_shared_kv_heads_match_oracle(core, kv_heads):
    rng = np.random.RandomState(kv_heads)
    layout = rng.rand(4, 5, 7) < np.array([0.2, 0.5, 0.8, 1.0]).reshape(4, 1, 1)
    block_mask = BlockMask(layout, None, 16, q_len=70, kv_len=100)
    Case(
        core, block_mask, heads=4, kv_heads=kv_heads, kv_lengths=[100, 37, 1, 99]
    ).check(workers=3)
    shared = pattern_block_mask("local", 70, 4, 16, 24)
    Case(core, shared, heads=4, kv_heads=kv_heads).check()


@pytest.mark.parametrize("kv_lengths", [[0, 1, 96, 50], [17, 95, 33, 64]])
def test_kv_lengths_match_oracle(core, kv_lengths):
    for attn_mode in ("all", "strided"):
        block_mask = pattern_block_mask(attn_mode, 96, 2, 32, 4)
        Case(core, block_mask, kv_lengths=kv_lengths).check()


@pytest.mark.parametrize("row_stride", [3, 7, 11])
def test_strides_that_do_not_divide_match_oracle(core, row_stride):
    block_mask = pattern_block_mask("strided", 256, 2, 16, row_stride)
    Case(core, block_mask).check()


def test_splits_that_are_apart_match_oracle(core):
    """No two q tiles read the same keys, and some keys nobody reads."""
    layout = np.zeros((2, 6, 9), bool)
    layout[0, [0, 1, 4], [0, 2, 5]] = True
    layout[1, [1, 3, 5], [1, 4, 8]] = layout[1, 3, 5] = True
    block_mask = BlockMask(layout, None, 16, q_len=90, kv_len=140)
    Case(core, block_mask, tile_q=16).check(workers=2)
    chunks = BlockMask(layouts.chunk_layout(160, 16, 32), None, 16)
    Case(core, chunks, heads=4, kv_heads=2, tile_q=32).check(workers=3)


def test_many_heads_match_oracle(core):
    """batch * kv_heads >= 16 takes the path without splits."""
    block_mask = pattern_block_mask("fixed", 90, 8, 16, 32, num_verts=2)
    Case(core, block_mask, heads=8).check(workers=2)
    Case(core, block_mask, heads=8, kv_heads=4).check(workers=2)


@settings(max_examples=40)
@given(cases(), st.sampled_from(DTYPES))
def test_random_plans_match_oracle(core, case, dtype):
    heads = max(case.layout.shape[0], 2)
    layout = case.layout
    if layout.shape[0] == 1 and case.mask.per_head:
        layout = np.repeat(layout, heads, axis=0)
    Case(core, BlockMask(layout, *case[1:]), dtype, heads=heads, head_dim=8).check(
        workers=2
    )


def test_tensors_are_read_and_written_through_strides(core):
    block_mask = pattern_block_mask("all", 40, 2, 16)
    case = Case(core, block_mask)
    expected = case.run()
    apart = {
        name: np.ascontiguousarray(x.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3)
        for name, x in case.arrays._asdict().items()
        if name != "dlse"
    }
    assert apart["q"].strides != case.arrays.q.strides
    assert same_bits(case.run(**apart), expected)


# ---- determinism ----


def test_results_are_bitwise_equal_for_any_number_of_workers(core):
    for attn_mode, heads in itertools.product(("all", "local", "fixed"), (2, 16)):
        block_mask = pattern_block_mask(attn_mode, 200, heads, 16, 48, num_verts=2)
        case = Case(core, block_mask, heads=heads)
        expected = case.run(workers=1)
        for workers in (1, 2, 3, 7):
            assert same_bits(case.run(workers), expected)


# ---- NaN, Inf and extremes ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", nan_rule.INPUTS)
def test_nan_and_inf_keep_to_the_rule(core, name, dtype):
    for attn_mode, value in itertools.product(PATTERNS, nan_rule.VALUES):
        block_mask = pattern_block_mask(attn_mode, 64, 2, 8, 16, num_verts=1)
        case = Case(core, block_mask, dtype)

        def run(inputs, case=case):
            return dict(zip(RESULTS, case.run(**inputs._asdict())))

        value = to_dtype(np.array(value), dtype)
        nan_rule.assert_keeps_to_the_rule(run, case.arrays, case.mask, name, value)


def test_keys_past_kv_lengths_do_not_leak(core):
    block_mask = BlockMask(layouts.dense_layout(64, 32), None, 32)
    case = Case(core, block_mask, kv_lengths=[40, 64], batch=2)
    clean = case.run()
    k, v = case.arrays.k.copy(), case.arrays.v.copy()
    k[0, 40:], v[0, 40:] = np.nan, np.inf
    assert same_bits(case.run(k=k, v=v), clean)
    assert not clean[3][0, 40:].any() and not clean[4][0, 40:].any()


def test_rows_without_keys_give_zero(core):
    layout = np.zeros((1, 3, 3), bool)
    layout[0, 1, 1] = True
    case = Case(core, BlockMask(layout, None, 16, q_len=40, kv_len=48))
    o, lse, dq, dk, dv = case.run()
    for rows in (slice(0, 16), slice(32, 40)):
        assert not o[:, rows].any() and not dq[:, rows].any()
        assert np.isneginf(lse[..., rows]).all()
    assert not dk[:, 32:].any() and not dv[:, :16].any()
    case.check()


def test_rows_with_one_key_return_its_value(core):
    block_mask = pattern_block_mask("local", 50, 2, 16, 1)
    for dtype in DTYPES:
        case = Case(core, block_mask, dtype)
        assert same_bits([case.run()[0]], [case.arrays.v])
        no_dlse = np.zeros_like(case.arrays.dlse)
        assert not as_float(case.run(dlse=no_dlse)[2]).any()  # nothing to choose from


def test_constant_values_return_the_constant(core):
    block_mask = pattern_block_mask("fixed", 100, 2, 16, 32, num_verts=2)
    case = Case(core, block_mask)
    o = case.run(v=np.ones_like(case.arrays.v))[0]
    np.testing.assert_array_max_ulp(o, np.ones_like(o), maxulp=4)


def test_extreme_logits_stay_finite(core):
    """float16 products near +-60,000 after scaling."""
    block_mask = pattern_block_mask("all", 64, 2, 32)
    case = Case(core, block_mask, "float16", head_dim=16)
    sign = np.sign(case.arrays.q)
    big = to_dtype(sign * 122.5, "float16")  # 16 * 122.5^2 / sqrt(16) = 60,025
    same = to_dtype(np.abs(sign) * 122.5, "float16")
    for k in (big, same):
        assert all(np.isfinite(x).all() for x in case.run(q=big, k=k))


# ---- bad input ----


@pytest.fixture(scope="module")
def good():
    block_mask = pattern_block_mask("fixed", 96, 2, 16, 32, num_verts=2)
    return block_mask, block_mask.tiles(32)


def run_with(core, good, change):
    """Forward and backward with a changed plan or problem; both must answer alike."""
    block_mask, tiles = good
    case = Case(core, block_mask)
    arrays = {
        name: getattr(tiles, name).copy()
        for name in ("kv_indptr", "kv_indices", "mask_ids", "mask_bits")
    }
    q, k, v, do, _ = case.arrays
    o, lse = case.core.fwd(q, k, v, block_mask, tiles)
    plan = plan_of(tiles._replace(**arrays), block_mask)
    change(plan, arrays)
    messages = []
    for call, tensors in ((core.fwd, (q, k, v)), (core.bwd, (q, k, v, o, lse, do))):
        try:
            call(*tensors, block_mask, tiles=tiles, plan=plan)
            messages.append(None)
        except InvalidArgument as error:
            messages.append(str(error))
    assert messages[0] == messages[1]
    return messages[0]


def setter(name, index, value):
    def change(plan, arrays):
        arrays[name][index] = value

    return change


def attribute(name, value):
    return lambda plan, arrays: setattr(plan, name, value)


BAD_PLANS = {
    r"kv_indptr\[0\] must be 0, got 1": setter("kv_indptr", 0, 1),
    r"kv_indptr\[2\] must be in \[\d+, \d+\], got -5": setter("kv_indptr", 2, -5),
    r"kv_indptr\[1\] must be in \[0, \d+\], got 1000": setter("kv_indptr", 1, 1000),
    r"kv_indptr must end with the number of entries": attribute("entries", 1000),
    r"kv_indices\[0\] must be in \[0, 6\), got -1": setter("kv_indices", 0, -1),
    r"kv_indices\[1\] must be in \[\d, 6\), got 6": setter("kv_indices", 1, 6),
    r"kv_indices\[1\] must be in \[1, 6\), got 0": setter("kv_indices", 1, 0),
    r"mask_ids\[0\] must be in \[-1, \d+\), got -2": setter("mask_ids", 0, -2),
    r"mask_ids\[0\] must be in \[-1, \d+\), got 99": setter("mask_ids", 0, 99),
    r"tile_q must be 8, 16, 32, 64 or 128, got 24": attribute("tile_q", 24),
    r"block_size must be 8, 16, 32, 64 or 128, got 0": attribute("block_size", 0),
    r"q_tiles must be at least 3 for q_len=96, got 2": attribute("q_tiles", 2),
    r"kv_blocks must be at least 6 for kv_len=96, got 5": attribute("kv_blocks", 5),
    r"the plan's heads must be 1 or heads=2, got 3": attribute("heads", 3),
    r"entries and mask_blocks must be in": attribute("mask_blocks", -1),
    r"arrays must begin at multiples of 4 bytes": lambda plan, arrays: setattr(
        plan, "mask_ids", plan.mask_ids + 1
    ),
}


@pytest.mark.parametrize("message", BAD_PLANS)
def test_bad_plans_are_refused(core, good, message):
    got = run_with(core, good, BAD_PLANS[message])
    assert got is not None
    assert re.search(message, got), got


@settings(max_examples=60)
@given(st.data())
def test_no_plan_value_crashes(core, good, data):
    def change(plan, arrays):
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(sorted(arrays)))
            flat = arrays[name].reshape(-1)
            at = data.draw(st.integers(0, len(flat) - 1))
            limits = np.iinfo(flat.dtype)
            near = st.integers(max(limits.min, -3), 12)
            flat[at] = data.draw(near | st.integers(limits.min, limits.max))

    run_with(core, good, change)  # refused or computed, but it comes back


def test_bad_problems_are_refused(core, good):
    block_mask, tiles = good
    case = Case(core, block_mask)
    q, k, v = case.arrays[:3]
    bad = {
        "head_dim must be a multiple of 8 in .*got 12": (q[..., :12], k[..., :12], v),
        "head_dim_v must be a multiple of 8 in .*got 4": (q, k, v[..., :4]),
        "kv_heads must divide heads, got kv_heads=2 and heads=1": (q[:, :, :1], k, v),
    }
    for message, arrays in bad.items():
        with pytest.raises(InvalidArgument, match=message):
            core.fwd(*arrays, block_mask, tiles=tiles)
    with pytest.raises(
        InvalidArgument, match=r"kv_lengths\[1\] must be in \[0, kv_len=96\], got 97"
    ):
        lengths = np.array([96, 97, 96, 96], np.int32)
        core.fwd(q, k, v, block_mask, tiles=tiles, kv_lengths=lengths)


def test_empty_batch_gives_empty_results(core, good):
    block_mask, tiles = good
    case = Case(core, block_mask, batch=0)
    o, lse, dq, dk, dv = case.run(workers=2)
    assert o.shape == (0, 96, 2, 16) and lse.shape == (0, 2, 96)
    assert dk.shape == (0, 96, 2, 16)
