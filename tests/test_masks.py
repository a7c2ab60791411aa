"""Masks against their rules, written out, and against themselves block by block."""

import doctest
from operator import and_, or_

import numpy as np
import pytest
from helpers import element_masks
from hypothesis import given
from hypothesis import strategies as st

from sparse_attention.plan import masks
from sparse_attention.plan.block_mask import BlockMask
from sparse_attention.plan.layouts import mask_layout
from sparse_attention.plan.masks import Span

Q, KV = np.arange(50)[:, None], np.arange(60)


def table(rule):
    """The rule element by element, in plain Python."""
    return np.array([[rule(i, j) for j in range(60)] for i in range(50)])


@pytest.mark.parametrize("n", [1, 7, 16, 100])
def test_masks_follow_their_rules(n):
    rules = [
        (masks.dense_mask(), lambda i, j: True),
        (masks.causal_mask(), lambda i, j: j <= i),
        (masks.local_mask(n), lambda i, j: 0 <= i - j < n),
        (masks.strided_mask(n), lambda i, j: j <= i and (i - j) % n == 0),
        (masks.chunk_mask(n), lambda i, j: i // n == j // n),
        (masks.sink_mask(n), lambda i, j: j < n),
    ]
    for mask, rule in rules:
        np.testing.assert_array_equal(mask(0, Q, KV), table(rule), repr(mask))


@pytest.mark.parametrize(
    "stride, block_size, num_verts, vertsize",
    [(16, 4, 4, 1), (16, 4, 1, 1), (16, 4, 2, 2), (16, 16, 1, 1), (24, 2, 3, 4)],
)
def test_fixed_mask_follows_its_rule(stride, block_size, num_verts, vertsize):
    mask = masks.fixed_mask(stride, block_size, num_verts, vertsize)
    last_first = range(stride // block_size - 1, -1, -1)
    groups = [last_first[i : i + vertsize] for i in range(0, len(last_first), vertsize)]
    for head in range(2 * num_verts):
        summary = groups[head % num_verts]

        def rule(i, j, summary=summary):
            in_window = i // stride == j // stride
            return j <= i and (in_window or j % stride // block_size in summary)

        np.testing.assert_array_equal(mask(head, Q, KV), table(rule))


@given(element_masks(), st.integers(1, 3), st.sampled_from([8, 16, 40]), st.data())
def test_bounds_never_contradict_the_elements(mask, step, size, data):
    starts = st.integers(0, 90)
    q_lo, kv_lo = data.draw(starts), data.draw(starts)
    head = data.draw(st.integers(0, 3))
    for q_step, kv_step in [(1, 1), (step, step), (step, 1)]:
        q, kv = q_lo + q_step * np.arange(size), kv_lo + kv_step * np.arange(size)
        all_true, none_true = mask.bounds(
            head, Span(q[0], q[-1], q_step), Span(kv[0], kv[-1], kv_step)
        )
        elements = mask(head, q[:, None], kv)
        assert not all_true or np.all(elements), mask
        assert not none_true or not np.any(elements), mask


@pytest.mark.parametrize(
    "mask, q, kv, expected",
    [
        (masks.dense_mask(), Span(0, 7), Span(8, 15), (True, False)),
        (masks.causal_mask(), Span(8, 15), Span(0, 7), (True, False)),
        (masks.causal_mask(), Span(7, 14), Span(0, 7), (True, False)),
        (masks.causal_mask(), Span(0, 7), Span(8, 15), (False, True)),
        (masks.causal_mask(), Span(0, 7), Span(0, 7), (False, False)),
        (masks.local_mask(16), Span(8, 15), Span(0, 7), (True, False)),
        (masks.local_mask(15), Span(8, 15), Span(0, 7), (False, False)),
        (masks.local_mask(9), Span(16, 23), Span(0, 7), (False, True)),
        (masks.local_mask(10), Span(16, 23), Span(0, 7), (False, False)),
        (masks.strided_mask(4), Span(34, 62, 4), Span(2, 30, 4), (True, False)),
        (masks.strided_mask(4), Span(34, 62, 4), Span(3, 31, 4), (False, True)),
        (masks.strided_mask(4), Span(34, 62, 4), Span(2, 9), (False, False)),
        (masks.strided_mask(4), Span(34, 41), Span(2, 30, 4), (False, False)),
        (masks.strided_mask(99), Span(64, 71), Span(8, 15), (False, True)),
        (masks.strided_mask(63), Span(64, 71), Span(8, 15), (False, False)),
        (masks.chunk_mask(32), Span(32, 47), Span(48, 63), (True, False)),
        (masks.chunk_mask(32), Span(32, 47), Span(64, 79), (False, True)),
        (masks.chunk_mask(32), Span(64, 79), Span(32, 47), (False, True)),
        (masks.chunk_mask(32), Span(24, 39), Span(24, 39), (False, False)),
        (masks.sink_mask(8), Span(24, 31), Span(0, 7), (True, False)),
        (masks.sink_mask(8), Span(24, 31), Span(8, 15), (False, True)),
        (masks.sink_mask(7), Span(24, 31), Span(0, 7), (False, False)),
        (masks.fixed_mask(32, 8), Span(64, 71), Span(24, 31), (True, False)),
        (masks.fixed_mask(32, 8), Span(64, 71), Span(16, 23), (False, True)),
        (masks.fixed_mask(32, 16, 2), Span(64, 71), Span(8, 23), (False, False)),
        (masks.fixed_mask(16, 8, 2), Span(64, 87), Span(8, 31), (False, False)),
    ],
)
def test_bounds_decide_what_they_can(mask, q, kv, expected):
    assert tuple(map(bool, mask.bounds(0, q, kv))) == expected


def test_combinations_are_and_and_or_with_functions_on_either_side():
    causal, odd = masks.causal_mask(), lambda head, q_idx, kv_idx: kv_idx % 2 == 1
    causal_table = table(lambda i, j: j <= i)
    odd_table = table(lambda i, j: j % 2 == 1)
    for mask in causal & odd, odd & causal:
        np.testing.assert_array_equal(mask(0, Q, KV), causal_table & odd_table)
    for mask in causal | odd, odd | causal:
        np.testing.assert_array_equal(mask(0, Q, KV), causal_table | odd_table)


def test_one_certain_side_decides_a_combination():
    unknown = masks.as_mask(lambda head, q_idx, kv_idx: q_idx > kv_idx)
    past, future = Span(0, 7), Span(16, 23)
    causal = masks.causal_mask()
    assert tuple((unknown & causal).bounds(0, past, future)) == (False, True)
    assert tuple((unknown & causal).bounds(0, future, past)) == (False, False)
    assert tuple((unknown | causal).bounds(0, future, past)) == (True, False)
    assert tuple((unknown | causal).bounds(0, past, future)) == (False, False)


def test_per_head_is_known_of_combinations():
    shared, differs = masks.causal_mask(), masks.fixed_mask(32, 8)
    unknown = masks.as_mask(lambda head, q_idx, kv_idx: q_idx > kv_idx)
    assert (shared & shared).per_head is False
    assert (unknown & shared).per_head is None
    assert (shared | unknown).per_head is None
    assert (unknown | differs).per_head is True
    assert (differs & unknown).per_head is True
    assert masks.fixed_mask(32, 8, num_verts=1).per_head is False


@pytest.mark.parametrize(
    "rule, differs",
    [
        (lambda head, q, kv: q >= kv, False),
        (lambda head, q, kv: True, False),
        (lambda head, q, kv: q >= kv + head, True),
        (lambda head, q, kv: head == 1, True),
        (lambda head, q, kv: np.array([3])[head] > kv, True),  # a table of one head
        (masks.causal_mask() | (lambda head, q, kv: q % 2**head == 0), True),
        (masks.Mask(lambda head, q, kv: q >= head, per_head=False), False),
        (masks.Mask(lambda head, q, kv: q >= kv, per_head=True), True),
    ],
)
def test_whether_heads_differ_is_found_by_a_call(rule, differs):
    assert masks.as_mask(rule).tells_heads_apart() is differs


@pytest.mark.parametrize("operator", [and_, or_])
def test_combinations_take_no_float_for_a_truth(operator):
    causal, bias = masks.causal_mask(), lambda *idx: np.where(idx[1] < 9, 0.0, -1e9)
    for mask in operator(causal, bias), operator(bias, causal):
        with pytest.raises(TypeError, match="mask must be True or False.* -1000000000"):
            mask(0, Q, KV)


def test_bounds_take_no_float_for_a_truth():
    mask = masks.Mask(masks.causal_mask(), lambda head, q, kv: (q.lo * 0.5, False))
    with pytest.raises(TypeError, match="all_true must be True or False"):
        mask.bounds(0, Span(8, 15), Span(0, 7))


def test_mask_repr_shows_how_it_is_made():
    mask = masks.local_mask(4) | (masks.sink_mask(2) & masks.causal_mask())
    assert repr(mask) == "(local_mask(4) | (sink_mask(2) & causal_mask()))"
    assert repr(masks.fixed_mask(32, 8)) == "fixed_mask(32, 8, 4, 1)"


@pytest.mark.parametrize("heads", [1, 2])
def test_callback_mask_calls_back_once_per_computed_block(heads):
    layout = np.random.RandomState(0).random_sample([heads, 5, 6]) < 0.5
    expected = np.zeros([heads, 20, 24], bool)
    calls = []

    def mask_callback(blk_shape, head_idx, query_blk_idx, key_blk_idx, blk_idx):
        block = np.random.RandomState(len(calls) % 7).random_sample(blk_shape) < 0.5
        q, kv = 4 * query_blk_idx, 4 * key_blk_idx
        expected[head_idx, q : q + 4, kv : kv + 4] = block
        calls.append((head_idx, query_blk_idx, key_blk_idx, blk_idx))
        return block

    mask = masks.callback_mask(mask_callback, layout, 4)
    assert calls == [
        (head, q, kv, blk_idx)
        for head in range(heads)
        for blk_idx, (q, kv) in enumerate(np.argwhere(layout[head]))
    ]
    head = np.arange(heads)[:, None, None]
    got = mask(head, np.arange(20)[:, None], np.arange(24))
    np.testing.assert_array_equal(np.broadcast_to(got, expected.shape), expected)
    assert mask.per_head is (heads > 1)


def test_callback_mask_of_a_shared_layout_serves_every_head():
    mask = masks.callback_mask(lambda *args: np.tril(np.ones(args[0])) > 0, [[1]], 4)
    np.testing.assert_array_equal(
        mask(3, np.arange(4)[:, None], np.arange(4)), np.tril(np.ones([4, 4], bool))
    )


@pytest.mark.parametrize("make", [masks.chunk_mask, masks.sink_mask])
@pytest.mark.parametrize("size", [0, -3, 2.5, None, True, "8"])
def test_sizes_must_be_positive_integers(make, size):
    with pytest.raises(ValueError, match=f"must be a positive integer, got {size!r}"):
        make(size)


@pytest.mark.parametrize(
    "args, message",
    [
        ((0, 8), "stride must be a positive integer, got 0"),
        ((40, 16), r"stride .* must be a multiple of block_size=16, got 40"),
        ((64, 16, 1, 3), r"vertsize must divide the window's 4 blocks .*, got 3"),
        ((64, 16, 3, 2), r"num_verts \* vertsize must be at most .* 4 .* got 3 \* 2"),
        ((64, 16, 0, 1), "num_verts must be a positive integer, got 0"),
        ((64, 16, 4, -1), "vertsize must be a positive integer, got -1"),
    ],
)
def test_fixed_mask_names_what_does_not_fit(args, message):
    with pytest.raises(ValueError, match=message):
        masks.fixed_mask(*args)


def test_window_and_stride_must_be_positive():
    with pytest.raises(ValueError, match="window must be a positive integer, got 0"):
        masks.local_mask(0)
    with pytest.raises(ValueError, match="stride must be a positive integer, got -1"):
        masks.strided_mask(-1)


def test_masks_must_be_callable():
    with pytest.raises(TypeError, match="mask must be a Mask, a function or a NumPy"):
        masks.causal_mask() & 3


# ---- not, arrays, offsets ----


@given(element_masks(), st.integers(0, 90), st.integers(0, 90))
def test_not_a_mask_is_the_opposite(mask, q_lo, kv_lo):
    q, kv = q_lo + np.arange(8), kv_lo + np.arange(16)
    np.testing.assert_array_equal(
        (~mask)(1, q[:, None], kv), ~np.asarray(mask(1, q[:, None], kv), bool)
    )
    spans = Span(q[0], q[-1]), Span(kv[0], kv[-1])
    assert tuple((~mask).bounds(1, *spans)) == tuple(mask.bounds(1, *spans))[::-1]
    assert (~mask).per_head is mask.per_head


def test_not_a_mask_shows_how_it_is_made():
    assert repr(~masks.causal_mask()) == "~causal_mask()"
    future = ~(masks.causal_mask() | masks.sink_mask(2))
    assert repr(future) == "~(causal_mask() | sink_mask(2))"
    np.testing.assert_array_equal(
        future(0, Q, KV), table(lambda i, j: j > i and j >= 2)
    )


@pytest.mark.parametrize("dtype", [bool, np.int8, np.float32])
def test_an_array_is_a_mask(dtype):
    array = np.random.RandomState(0).randint(0, 2, [50, 60])
    mask = masks.as_mask(array.astype(dtype))
    np.testing.assert_array_equal(mask(3, Q, KV), array == 1)
    assert mask.tells_heads_apart() is False and repr(mask) == "array[50, 60]"
    causal = np.arange(60) <= np.arange(50)[:, None]
    given = array.astype(bool)
    for both in masks.causal_mask() & given, given & masks.causal_mask():
        np.testing.assert_array_equal(both(0, Q, KV), (array == 1) & causal)
    for either in masks.causal_mask() | given, given | masks.causal_mask():
        np.testing.assert_array_equal(either(0, Q, KV), (array == 1) | causal)


def test_an_array_by_head_is_a_mask_by_head():
    array = np.random.RandomState(1).randint(0, 2, [3, 20, 30]) == 1
    head, q, kv = np.arange(3)[:, None, None], np.arange(20)[:, None], np.arange(30)
    mask = masks.as_mask(array)
    np.testing.assert_array_equal(mask(head, q, kv), array)
    layout = mask_layout(mask, 20, 8, 30, heads=3)
    plan = BlockMask(layout, array, 8, 20, 30)
    np.testing.assert_array_equal(plan.to_dense(), array)
    one = masks.as_mask(array[:1])  # one head stands for all
    np.testing.assert_array_equal(one(2, q, kv), array[0])
    plan = BlockMask(mask_layout(array[0], 20, 8, 30), array[0], 8, 20, 30)
    np.testing.assert_array_equal(plan.to_dense(), array[:1])


def test_an_array_that_changes_later_changes_no_mask():
    array = np.ones([4, 4], bool)
    mask = masks.as_mask(array)
    array[:] = False
    assert mask(0, 3, 3)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.ones([8, 9], bool), "every query .* from 0 to 9, got shape .8, 9."),
        (np.ones([10, 7], bool), "every key .* from 0 to 8, got shape .10, 7."),
        (np.ones([2, 10, 9], bool), "every head .* from 0 to 2, got shape .2, 10, 9."),
    ],
)
def test_an_array_that_is_too_small_is_refused(array, message):
    layout = np.ones([3, 2, 2], bool)
    with pytest.raises(ValueError, match=message):
        BlockMask(layout, array, 8, q_len=10, kv_len=9)


def test_an_array_must_be_a_truth_with_two_or_three_axes():
    for shape in [4], [1, 1, 4, 4], [0, 4]:
        with pytest.raises(ValueError, match=r"must be \[q_len, kv_len\] or .*, got"):
            masks.as_mask(np.ones(shape, bool))
    with pytest.raises(TypeError, match="mask must be True or False.*-inf"):
        masks.causal_mask() & np.array([[0.0, -np.inf]])
    with pytest.raises(ValueError, match="every query .* from -1 to -1"):
        masks.as_mask(np.ones([4, 4], bool))(0, -1, 0)


OFFSET_MASKS = [
    (masks.causal_mask, ()),
    (masks.local_mask, (7,)),
    (masks.strided_mask, (5,)),
    (masks.fixed_mask, (16, 4, 2)),
]


@pytest.mark.parametrize("make, args", OFFSET_MASKS)
@pytest.mark.parametrize("offset", [-9, 0, 1, 22])
def test_a_query_with_an_offset_has_the_row_of_its_position(make, args, offset):
    """Of a longer table, the rows from `offset` on; rows before the first have no keys."""
    got = make(*args, offset=offset)
    positions = np.arange(50) + offset
    want = make(*args)(1, np.maximum(positions, 0)[:, None], KV)
    want = want & (positions >= 0)[:, None]
    np.testing.assert_array_equal(got(1, Q, KV), want)
    for q_lo, kv_lo in np.ndindex(6, 7):
        q, kv = 8 * q_lo, 8 * kv_lo
        block = want[q : q + 8, kv : kv + 8]
        bounds = got.bounds(1, Span(q, q + 7), Span(kv, kv + 7))
        assert not bounds[0] or block.all()
        assert not bounds[1] or not block.any()
    assert got.per_head is make(*args).per_head


def test_an_offset_lines_up_the_ends():
    dense = masks.causal_mask(offset=2)(0, np.arange(3)[:, None], np.arange(5))
    np.testing.assert_array_equal(
        dense.astype(int), [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    )
    dense = masks.local_mask(2, offset=2)(0, np.arange(3)[:, None], np.arange(5))
    np.testing.assert_array_equal(
        dense.astype(int), [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    )
    assert repr(masks.causal_mask(offset=2)) == "causal_mask(offset=2)"
    assert repr(masks.local_mask(2, offset=-2)) == "local_mask(2, offset=-2)"
    assert (
        repr(masks.fixed_mask(32, 8, offset=4)) == "fixed_mask(32, 8, 4, 1, offset=4)"
    )


@pytest.mark.parametrize("make, args", OFFSET_MASKS)
@pytest.mark.parametrize("offset", [0.5, None, "1", True])
def test_an_offset_must_be_an_integer(make, args, offset):
    with pytest.raises(ValueError, match=f"offset must be an integer, got {offset!r}"):
        make(*args, offset=offset)


def test_callback_mask_checks_what_comes_back():
    with pytest.raises(ValueError, match=r"must return shape \(8, 8\), got \(8,\)"):
        masks.callback_mask(lambda *args: np.ones(8, bool), np.ones([1, 1]), 8)
    with pytest.raises(TypeError, match="must return bool, got float64"):
        masks.callback_mask(lambda *args: np.ones([8, 8]), np.ones([1, 1]), 8)


def test_masks_docstrings_run():
    assert doctest.testmod(masks).attempted
    assert not doctest.testmod(masks).failed


def test_bounds_of_single_numbers_warn_of_nothing(recwarn):
    masks.strided_mask(4).bounds(0, Span(0, 8, 4), Span(1, 9, 4))
    assert not recwarn.list
