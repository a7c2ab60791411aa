"""Plans against layout and mask, element by element, in every form that a plan has."""

import base64
import doctest
import io
import json
import pickle
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from helpers import NO_ROWS_IN_A_BLOCK, cases, in_blocks, in_positions, visited_rows
from hypothesis import example, given, settings

from sparse_attention.plan import block_mask as block_mask_module
from sparse_attention.plan import layouts, masks
from sparse_attention.plan.block_mask import EMPTY, FULL, PARTIAL, BlockMask
from sparse_attention.plan.patterns import pattern_block_mask

PYTHONPATH = ":".join(filter(None, sys.path))


def in_rows(case):
    """bool [heads, q_len, kv_len]: the definition."""
    q, kv = visited_rows(case)
    allowed, _ = in_positions(case)
    dense = np.zeros((len(allowed), case.q_len, case.kv_len), bool)
    dense[:, q[q >= 0, None], kv[kv >= 0]] = allowed[:, q >= 0][:, :, kv >= 0]
    return dense


@given(cases())
def test_to_dense_is_layout_and_mask(case):
    np.testing.assert_array_equal(BlockMask(*case).to_dense(), in_rows(case))


@given(cases())
@example(NO_ROWS_IN_A_BLOCK)
def test_keys_of_a_row_are_those_of_the_dense_mask(case):
    dense, (_, kv_rows) = in_rows(case), visited_rows(case)
    block_mask = BlockMask(*case)
    for row in range(case.q_len):
        keys = block_mask.keys_of(row)
        assert keys.dtype == np.int32
        assert keys.shape == (len(dense), dense[:, row].sum(axis=1).max())
        for head, attends in enumerate(dense[:, row]):
            in_order = [j for j in kv_rows if j >= 0 and attends[j]]
            filling = [-1] * (keys.shape[1] - len(in_order))
            assert keys[head].tolist() == in_order + filling


@given(cases())
@example(NO_ROWS_IN_A_BLOCK)
def test_block_kinds_are_exact(case):
    allowed, exists = (in_blocks(x, *[case.block_size] * 2) for x in in_positions(case))
    expected = np.where((allowed == exists).all(axis=(3, 4)), FULL, PARTIAL)
    expected[~allowed.any(axis=(3, 4))] = EMPTY
    block_mask = BlockMask(*case)
    np.testing.assert_array_equal(block_mask.block_kinds, expected)
    assert block_mask.density == np.count_nonzero(expected) / expected.size


@given(cases())
def test_lists_by_query_and_by_key_hold_the_same_blocks(case):
    block_mask = BlockMask(*case)
    expected = np.argwhere(block_mask.block_kinds != EMPTY)

    def pairs(indptr, indices, blocks):
        owner = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        return owner // blocks, owner % blocks, indices

    head, q, kv = pairs(
        block_mask.kv_indptr, block_mask.kv_indices, block_mask.q_blocks
    )
    np.testing.assert_array_equal(np.stack([head, q, kv], axis=1), expected)
    head, kv, q = pairs(block_mask.q_indptr, block_mask.q_indices, block_mask.kv_blocks)
    by_key = expected[np.lexsort(expected[:, [1, 2, 0]].T)]
    np.testing.assert_array_equal(np.stack([head, q, kv], axis=1), by_key)


@given(cases(block_sizes=[8]))
def test_block_sizes_do_not_change_the_pattern(case):
    dense = [
        BlockMask(
            layouts.dense_layout(case.q_len, size, case.kv_len, heads=2),
            case.mask,
            size,
            case.q_len,
            case.kv_len,
        ).to_dense()
        for size in (8, 16, 32, 64, 128)
    ]
    for other in dense[1:]:
        np.testing.assert_array_equal(other, dense[0])


@settings(max_examples=30)
@given(cases())
def test_building_in_pieces_does_not_change_the_plan(case):
    whole = BlockMask(*case)
    chunk = block_mask_module.CHUNK
    try:
        block_mask_module.CHUNK = 3 * case.block_size**2
        pieces = BlockMask(*case)
    finally:
        block_mask_module.CHUNK = chunk
    np.testing.assert_array_equal(pieces.block_kinds, whole.block_kinds)
    for a, b in zip(pieces.tiles(), whole.tiles()):
        np.testing.assert_array_equal(a, b)


def test_no_mask_leaves_every_block_full():
    block_mask = BlockMask([[1, 0], [1, 1]], block_size=8, q_len=13, kv_len=11)
    np.testing.assert_array_equal(block_mask.block_kinds, [[[2, 0], [2, 2]]])
    assert block_mask.to_dense().sum() == 13 * 11 - 8 * 3


def test_elements_are_evaluated_only_where_blocks_are_undecided():
    evaluated = []
    causal = masks.causal_mask()

    def fn(head, q_idx, kv_idx):
        evaluated.append(np.broadcast(q_idx, kv_idx).size)
        return causal(head, q_idx, kv_idx)

    def count(per_head):
        del evaluated[:]
        mask = masks.Mask(fn, causal.bounds, per_head)
        layout = layouts.dense_layout(1000, 16, heads=4)
        BlockMask(layout, mask, 16, q_len=1000, kv_len=1000)
        return sum(evaluated)

    assert count(per_head=False) == 63 * 16 * 16  # the diagonal, for all heads at once
    assert count(per_head=None) == 63 * 16 * 16 + 1  # and a call that tells
    assert count(per_head=True) == 4 * 63 * 16 * 16


@given(cases())
@example(NO_ROWS_IN_A_BLOCK)
def test_causal_plans_are_told_from_others(case):
    block_mask = BlockMask(*case)
    assert block_mask.is_causal == (not np.triu(in_rows(case), 1).any())
    loaded = BlockMask.from_config(block_mask.get_config())
    assert loaded.is_causal == block_mask.is_causal


@pytest.mark.parametrize("row_stride", [1, 2, 7])
@pytest.mark.parametrize("time", [1, 8, 9, 16, 33])
@pytest.mark.parametrize("more_keys", [0, 3])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_one_later_key_makes_a_plan_not_causal(row_stride, time, more_keys, shift):
    mask, kv_len = masks.Mask(lambda head, q, k: k <= q + shift), time + more_keys
    row_stride = min(row_stride, time)
    q_blocks, kv_blocks = (
        -(-(-(-length // row_stride) * row_stride) // 8) for length in (time, kv_len)
    )
    layout = np.ones([q_blocks, kv_blocks], bool)
    block_mask = BlockMask(layout, mask, 8, time, kv_len, row_stride)
    assert block_mask.is_causal == (shift <= 0 or kv_len == 1)


def test_plans_are_made_once_and_are_read_only():
    layout = np.ones([1, 2, 2], bool)
    block_mask = BlockMask(layout, masks.causal_mask(), 8)
    layout[:] = False
    assert block_mask.layout.all()
    assert block_mask.tiles() is block_mask.tiles()
    assert block_mask.tiles(16) is block_mask.tiles(16)
    assert block_mask.kv_tiles(32) is block_mask.kv_tiles(32)
    assert block_mask.q_indices is block_mask.q_indices
    arrays = [block_mask.layout, block_mask.block_kinds, block_mask.q_indptr]
    arrays += [
        block_mask.q_indices,
        *block_mask.tiles(16)[2:],
        *block_mask.tiles(8)[2:],
        *block_mask.kv_tiles(32)[2:],
    ]
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


# ---- errors ----


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"block_size": 12}, r"block_size must be one of \[8, .*\], got 12"),
        ({"block_size": 8.0}, "block_size must be a positive integer, got 8.0"),
        ({"q_len": 8}, "layout must have 1 q_blocks for q_len=8, .*, got 2"),
        ({"kv_len": 17}, "layout must have 3 kv_blocks for kv_len=17, .*, got 2"),
        ({"q_len": 0}, "q_len must be a positive integer, got 0"),
        ({"kv_len": 2.5}, "kv_len must be a positive integer, got 2.5"),
        ({"row_stride": 0}, "row_stride must be a positive integer, got 0"),
        ({"row_stride": 17}, "row_stride must be at most 16, the longer of .* got 17"),
        ({"q_len": 10, "row_stride": 9}, "must have 3 q_blocks .* row_stride=9, got 2"),
        ({"layout": np.ones(4)}, r"layout must be .*, got shape \(4,\)"),
        ({"layout": np.ones([1, 1, 2, 2])}, "layout must be .*, got shape"),
        ({"layout": np.ones([0, 2, 2])}, "layout must be .*, got shape"),
        ({"mask": masks.fixed_mask(16, 8, 2)}, "layout must have a head for .*, got 1"),
        ({"mask": lambda h, q, k: q >= h}, "layout must have a head .* per_head=False"),
        ({"block_size": [8]}, r"block_size must be a positive integer, got \[8\]"),
    ],
)
def test_block_mask_names_what_does_not_fit(kwargs, message):
    args = dict({"layout": np.ones([2, 2]), "block_size": 8}, **kwargs)
    with pytest.raises(ValueError, match=message):
        BlockMask(**args)


def test_block_mask_wants_a_function():
    with pytest.raises(
        TypeError, match="mask must be a Mask, a function or .*, got 'causal'"
    ):
        BlockMask(np.ones([2, 2]), "causal", 8)


@pytest.mark.parametrize("row", [-1, 13])
def test_keys_of_names_a_row_that_is_none(row):
    block_mask = BlockMask(np.ones([2, 2]), block_size=8, q_len=13)
    with pytest.raises(ValueError, match=f"row must be from 0 to 12, got {row}"):
        block_mask.keys_of(row)


# ---- showing ----


def test_repr_draws_a_square_of_blocks_as_one_character():
    drawing = repr(pattern_block_mask("all", 64 * 32, 1, 32)).splitlines()
    assert drawing[0] == (
        "BlockMask(q_len=2048, kv_len=2048, block_size=32, heads=1, density 51 %)"
    )
    assert drawing[1:] == ["█" * i + "▒" + "·" * (31 - i) for i in range(32)]


def test_repr_draws_at_most_four_heads_and_says_the_row_stride():
    lines = repr(pattern_block_mask("fixed", 8192, 8, 32, 128)).splitlines()
    assert [len(line) for line in lines[1:]] == [4 * 16 + 3 * 2] * 16
    assert repr(pattern_block_mask("strided", 64, 1, 8, 8)).splitlines() == [
        "BlockMask(q_len=64, kv_len=64, block_size=8, heads=1, row_stride=8, "
        "density 12 %)"
    ] + ["·" * i + "▒" + "·" * (7 - i) for i in range(8)]


def test_ascii_draws_with_what_it_has():
    code = (
        "import sparse_attention as sa; print(sa.pattern_block_mask('all', 24, 1, 8))"
    )
    for encoding, rows in ("ascii", "+.. #+. ##+"), ("utf-8", "▒·· █▒· ██▒"):
        output = subprocess.check_output(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": PYTHONPATH, "PYTHONIOENCODING": encoding},
        )
        assert output.decode(encoding).split()[-3:] == rows.split()


def test_block_mask_docstrings_run():
    assert doctest.testmod(block_mask_module).attempted
    assert not doctest.testmod(block_mask_module).failed


# ---- cost ----


def test_keys_of_a_row_take_no_longer_in_a_longer_sequence():
    def milliseconds(q_len):
        block_mask = pattern_block_mask("local", q_len, 1, 32, 128)
        times = []
        for row in range(q_len - 100, q_len):
            start = time.perf_counter()
            block_mask.keys_of(row)
            times.append(time.perf_counter() - start)
        return 1000 * min(times[1:])  # the first one makes the plan

    assert milliseconds(65536) < 2 * milliseconds(1024)


def test_the_plan_of_a_function_of_16384_positions_takes_3_seconds_at_most():
    def window(head, q, kv):
        return abs(q - kv) <= 64

    start = time.process_time()
    plan = BlockMask(layouts.mask_layout(window, 16384, 32), window, 32)
    seconds = time.process_time() - start
    print(f"{seconds:.2f} s")
    assert plan.layout.mean() < 0.01 and seconds < 3


# The peak of this process alone: getrusage would count the parent's, too.
MEASURE = """
import re, time
from sparse_attention.plan.patterns import pattern_block_mask
start = time.process_time()
plan = pattern_block_mask({mode!r}, 65536, 8, 32, {ctx})
plan.tiles(), plan.kv_tiles(128)
seconds = time.process_time() - start
peak = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read()).group(1)
print(seconds, int(peak) / 1024)
"""


@pytest.mark.parametrize(
    "mode, ctx", [("fixed", 128), ("all", None), ("local", 128), ("strided", 256)]
)
def test_plan_for_65536_positions_takes_3_seconds_and_500_mb_at_most(mode, ctx):
    code = MEASURE.format(mode=mode, ctx=ctx)
    output = subprocess.check_output(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": PYTHONPATH},
        universal_newlines=True,
    )
    seconds, peak_mb = map(float, output.split())
    print(f"{mode}: {seconds:.2f} s, {peak_mb:.0f} MB")
    assert seconds < 3
    assert peak_mb < 500


# ---- saving ----


@given(cases())
def test_config_makes_the_same_plan_again(case):
    plan = BlockMask(*case)
    again = BlockMask.from_config(json.loads(json.dumps(plan.get_config())))
    assert repr(again) == repr(plan) and again.density == plan.density
    np.testing.assert_array_equal(again.to_dense(), plan.to_dense())
    for tile_q in {plan.block_size, 128}:
        for a, b in zip(again.tiles(tile_q), plan.tiles(tile_q)):
            np.testing.assert_array_equal(a, b)
    assert again.get_config() == plan.get_config()


def test_config_is_small():
    """All that a plan for 16,384 positions in eight heads needs, in 100 kB."""
    plan = pattern_block_mask("fixed", 16384, 8, 32, 128)
    assert len(json.dumps(plan.get_config())) < 100e3


PLAN = BlockMask(layouts.local_layout(43, 8, 16, 2), masks.local_mask(16), 8, 43, 43)
ARRAYS = {
    "block_kinds": PLAN.block_kinds,
    "mask_ids": PLAN._blocks.mask_ids,
    "mask_bits": PLAN._blocks.mask_bits,
}


def config_of(**changes):
    """The configuration of `PLAN` with other arrays or sizes."""
    arrays = {name: changes.pop(name, array) for name, array in ARRAYS.items()}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    text = base64.b64encode(file.getvalue()).decode()
    return {**PLAN.get_config(), "arrays": text, **changes}


def other(name, index, value):
    """One of `ARRAYS` with another value."""
    array = ARRAYS[name].copy()
    array[index] = value
    return {name: array}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arrays": 3}, "arrays.* damaged"),
        ({"arrays": "%%%"}, "arrays.* damaged"),
        ({"arrays": PLAN.get_config()["arrays"][:-200]}, "arrays.* damaged"),
        ({"mask_ids": None}, "arrays.* damaged.*mask_ids"),
        ({"block_kinds": np.array({})}, "arrays.* damaged: .*block_kinds is object"),
        ({"block_kinds": PLAN.block_kinds[0]}, r"block_kinds is int8 \(6, 6\)"),
        ({"block_kinds": PLAN.block_kinds.astype(float)}, "block_kinds is float64"),
        ({"block_kinds": PLAN.block_kinds[:, :5]}, "must have 6 q_blocks .* got 5"),
        ({"block_kinds": PLAN.block_kinds[:0]}, "layout must be .* none of them zero"),
        (other("block_kinds", (0, 0, 0), 3), "block_kinds"),
        (other("block_kinds", (0, 0, 0), -1), "block_kinds"),
        (other("block_kinds", (0, 5, 0), PARTIAL), "got mask_ids .* fit 21 partial"),
        ({"mask_ids": ARRAYS["mask_ids"].astype(np.int64)}, "mask_ids is int64"),
        ({"mask_ids": ARRAYS["mask_ids"][:-1]}, "got mask_ids that do not fit"),
        (other("mask_ids", 0, 99), "got mask_ids that do not fit"),
        (other("mask_ids", 0, -1), "got mask_ids that do not fit"),
        ({"mask_bits": ARRAYS["mask_bits"][:0]}, "got mask_ids that do not fit"),
        ({"mask_bits": ARRAYS["mask_bits"][:, :4]}, "got mask_bits that do not fit"),
        ({"block_size": 16}, "must have 3 q_blocks"),
        ({"block_size": 8.0}, "block_size must be a positive integer, got 8.0"),
        ({"q_len": None}, "q_len must be a positive integer, got None"),
        ({"kv_len": "43"}, "kv_len must be a positive integer, got '43'"),
        (
            {"q_len": 2**62},
            "layout must have .* q_blocks for q_len=4611686018427387904",
        ),
        ({"row_stride": 2**62}, "row_stride must be at most 43"),
        ({"heads": 2}, r"config must be a dict with \['block_size', .*'heads'"),
    ],
)
def test_a_damaged_config_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        BlockMask.from_config(config_of(**changes))


def test_what_is_no_config_is_named():
    with pytest.raises(ValueError, match="config must be a dict with .*, got None"):
        BlockMask.from_config(None)


def test_damage_anywhere_is_an_error_or_makes_another_plan():
    random, original = np.random.RandomState(0), PLAN.get_config()["arrays"]
    for _ in range(300):
        data = bytearray(base64.b64decode(original))
        for at in random.randint(len(data), size=random.randint(1, 4)):
            data[at] = random.randint(256)
        text = base64.b64encode(data).decode()
        try:
            plan = BlockMask.from_config({**PLAN.get_config(), "arrays": text})
        except ValueError as error:
            assert "arrays" in str(error)
        else:
            assert plan.to_dense().shape == (2, 43, 43) and plan.tiles() and repr(plan)


def test_a_small_file_cannot_fill_the_memory(monkeypatch):
    zeros = np.zeros([1, 2048, 2048], np.int8)
    config = config_of(block_kinds=zeros, q_len=16384, kv_len=16384)
    assert len(config["arrays"]) < 20e3
    monkeypatch.setattr(block_mask_module, "MAX_SAVED", 1 << 20)
    with pytest.raises(ValueError, match="4194.* bytes, where 1048576 are allowed"):
        BlockMask.from_config(config)


def test_an_array_cannot_claim_more_than_there_is():
    file = io.BytesIO()
    np.save(file, PLAN.block_kinds)
    claims = file.getvalue().replace(b"(2, 6, 6), }      ", b"(2, 6, 1000000), }")
    assert len(claims) == len(file.getvalue()) and claims != file.getvalue()
    text = base64.b64decode(PLAN.get_config()["arrays"])
    with zipfile.ZipFile(io.BytesIO(text)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            is_claim = name == "block_kinds.npy"
            new.writestr(name, claims if is_claim else old.read(name))
    text = base64.b64encode(file.getvalue()).decode()
    with pytest.raises(ValueError, match="arrays.* damaged"):
        BlockMask.from_config({**PLAN.get_config(), "arrays": text})


def test_a_plan_that_cannot_be_loaded_is_not_saved(monkeypatch):
    monkeypatch.setattr(block_mask_module, "MAX_SAVED", 100)
    with pytest.raises(ValueError, match="at most 100 bytes, got .*larger blocks"):
        PLAN.get_config()


@pytest.mark.parametrize(
    "mask",
    [
        lambda head, q, k: np.where(k <= q, 0.0, -1e9),
        lambda head, q, k: -0.5 * np.abs(q - k),
        lambda head, q, k: np.where(k <= q, 1j, 0),
    ],
    ids=["additive", "alibi", "complex"],
)
def test_what_is_no_truth_is_no_mask(mask):
    with pytest.raises(TypeError, match="mask must be"):
        BlockMask(np.ones([4, 4], bool), mask, 8)


def test_a_layout_of_scores_is_refused():
    with pytest.raises(TypeError, match="layout must be True or False.*-inf"):
        BlockMask(np.where(np.tri(4), 0.0, -np.inf), None, 8)
    with pytest.raises(TypeError, match="layout must be True or False.*-inf"):
        masks.callback_mask(lambda *block: True, np.where(np.tri(4), 0.0, -np.inf), 8)
    assert BlockMask(np.tri(4), None, 8).density == 0.625  # 0 and 1 are truths


def test_a_pickle_holds_the_plan():
    plan = pattern_block_mask("strided", 75, 2, 8, local_attn_ctx=5)
    again = pickle.loads(pickle.dumps(plan))
    assert again.row_stride == 5 and np.array_equal(again.to_dense(), plan.to_dense())
