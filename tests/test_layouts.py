"""Layouts against the table of rules, written out block by block, and drawings."""

import doctest

import helpers  # noqa: F401 - the settings of Hypothesis, before a test is decorated
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_attention.plan import layouts, masks


def table(q_blocks, rule):
    """The rule on blocks, in plain Python."""
    blocks = range(q_blocks)
    return np.array([[bool(rule(q, kv)) for kv in blocks] for q in blocks])


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
@pytest.mark.parametrize("q_blocks", [1, 2, 12])
def test_layouts_follow_the_ancestors_rules(block_size, q_blocks):
    q_len = q_blocks * block_size
    np.testing.assert_array_equal(
        layouts.all_layout(q_len, block_size)[0],
        table(q_blocks, lambda q, kv: kv <= q),
    )
    for diagonals in 1, 2, 5, 20:
        np.testing.assert_array_equal(
            layouts.local_layout(q_len, block_size, diagonals * block_size)[0],
            table(q_blocks, lambda q, kv, n=diagonals: kv <= q and q - kv <= n),
        )
    for chunk in 1, 2, 3, 4, 6, 12:  # blocks that one residue of the rows fills
        if q_blocks % chunk == 0:
            stride = q_blocks // chunk
            np.testing.assert_array_equal(
                layouts.strided_layout(q_len, block_size, stride)[0],
                table(q_blocks, lambda q, kv, n=chunk: kv <= q and kv // n == q // n),
            )


@pytest.mark.parametrize(
    "stride, num_verts, vertsize, heads",
    [
        (4, 4, 1, 4),
        (4, 4, 1, 8),
        (4, 1, 1, 1),
        (4, 1, 2, 3),
        (6, 3, 2, 6),
        (1, 1, 1, 2),
    ],
)
def test_fixed_layout_follows_the_ancestors_rule(stride, num_verts, vertsize, heads):
    for block_size, q_blocks in (8, 17), (32, 12), (64, 3):
        got = layouts.fixed_layout(
            q_blocks * block_size,
            block_size,
            stride * block_size,
            num_verts,
            vertsize,
            heads,
        )
        positions = list(range(stride - 1, -1, -1))
        groups = [positions[i : i + vertsize] for i in range(0, stride, vertsize)]
        for head in range(heads):
            group = groups[head % num_verts]

            def rule(q, kv, group=group):
                return kv <= q and (q // stride == kv // stride or kv % stride in group)

            np.testing.assert_array_equal(got[head], table(q_blocks, rule))
        assert len(got) == heads


def test_layouts_match_their_drawings():
    drawings = {
        "1... 11.. 111. 1111": layouts.all_layout(64, 16),
        "1... 11.. .11. ..11": layouts.local_layout(64, 16, window=16),
        "1... 11.. ..1. ..11": layouts.strided_layout(64, 16, stride=2),
        "1... 11.. .11. .111": layouts.fixed_layout(64, 16, stride=32, num_verts=1),
        "11.. 11.. ..11 ..11": layouts.chunk_layout(64, 16, chunk=32),
        "1... 11.. 111. 1.11": layouts.sink_layout(64, 16, window=16, sinks=1),
        "111 111": layouts.dense_layout(32, 16, kv_len=48),
    }
    for drawing, layout in drawings.items():
        rows = ["".join(".1"[block] for block in row) for row in layout[0].astype(int)]
        assert " ".join(rows) == drawing


def test_lengths_that_fill_no_block_round_up():
    assert layouts.all_layout(33, 16).shape == (1, 3, 3)
    assert layouts.dense_layout(1, 16, kv_len=17).shape == (1, 1, 2)
    # 5 rows a residue, 4 residues: 20 positions
    assert layouts.strided_layout(17, 8, stride=4).shape == (1, 3, 3)


@given(
    st.sampled_from([8, 16, 32]),
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(1, 12),
)
def test_layouts_hold_just_the_blocks_that_their_masks_touch(block_size, n, size, w):
    window = w * block_size
    pairs = [
        (layouts.all_layout(n, block_size), masks.causal_mask()),
        (layouts.local_layout(n, block_size, size), masks.local_mask(size)),
        (layouts.chunk_layout(n, block_size, size), masks.chunk_mask(size)),
        (
            layouts.sink_layout(n, block_size, size, w),
            masks.local_mask(size) | (masks.sink_mask(w) & masks.causal_mask()),
        ),
        (
            layouts.fixed_layout(n, block_size, window, num_verts=1),
            masks.fixed_mask(window, block_size, num_verts=1),
        ),
    ]
    row = np.arange(n)
    for layout, mask in pairs:
        touched = np.zeros(layout.shape[1:], bool)
        q, kv = np.nonzero(mask(0, row[:, None], row))
        touched[q // block_size, kv // block_size] = True
        np.testing.assert_array_equal(layout[0], touched, repr(mask))


@given(st.sampled_from([8, 16, 32]), st.integers(1, 150), st.integers(1, 40))
def test_strided_layout_holds_every_pair_in_transposed_time(block_size, q_len, stride):
    layout = layouts.strided_layout(q_len, block_size, stride)[0]
    n = -(-q_len // stride)
    order = [(p % n) * stride + p // n for p in range(n * stride)]
    touched = np.zeros(layout.shape, bool)
    for q_position, q in enumerate(order):
        for kv_position, kv in enumerate(order):
            if kv <= q and (q - kv) % stride == 0:
                touched[q_position // block_size, kv_position // block_size] = True
    np.testing.assert_array_equal(layout, touched)


def test_layouts_repeat_for_heads():
    for layout, one in [
        (layouts.all_layout(40, 8, heads=3), layouts.all_layout(40, 8)),
        (layouts.local_layout(40, 8, 9, heads=3), layouts.local_layout(40, 8, 9)),
        (layouts.strided_layout(40, 8, 5, heads=3), layouts.strided_layout(40, 8, 5)),
        (layouts.dense_layout(40, 8, 16, heads=3), layouts.dense_layout(40, 8, 16)),
        (layouts.chunk_layout(40, 8, 9, heads=3), layouts.chunk_layout(40, 8, 9)),
        (layouts.sink_layout(40, 8, 9, 2, heads=3), layouts.sink_layout(40, 8, 9, 2)),
    ]:
        np.testing.assert_array_equal(layout, np.repeat(one, 3, axis=0))


def test_mask_layout_ends_with_the_lengths():
    layout = layouts.mask_layout(masks.chunk_mask(10), 9, 8, kv_len=24)
    np.testing.assert_array_equal(layout, [[[1, 1, 0], [1, 1, 0]]])
    layout = layouts.mask_layout(masks.chunk_mask(10), 24, 8, kv_len=9)
    np.testing.assert_array_equal(layout, [[[1, 1], [1, 1], [0, 0]]])


FUNCTIONS = {
    "future": lambda head, q, kv: q < kv,
    "nothing": lambda head, q, kv: np.zeros(np.broadcast(q, kv).shape, bool),
    "keys alone": lambda head, q, kv: kv % 20 == 3,
    "a number": lambda head, q, kv: True,
    "half bounded": masks.causal_mask() & (lambda head, q, kv: (q - kv) % 13 == 12),
    "by head": lambda head, q, kv: q - kv == 9 * head,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("chunk", [1, 200, 1 << 20])
def test_mask_layout_finds_the_blocks_of_a_function(name, chunk, monkeypatch):
    monkeypatch.setattr(layouts, "CHUNK", chunk)  # elements at a time
    mask = masks.as_mask(FUNCTIONS[name])
    for block_size, q_len, kv_len in (8, 43, 30), (16, 100, 129), (8, 3, 80):
        layout = layouts.mask_layout(mask, q_len, block_size, kv_len, heads=3)
        head = np.arange(3)[:, None, None]
        allowed = mask(head, np.arange(q_len)[:, None], np.arange(kv_len))
        head, q, kv = np.nonzero(np.broadcast_to(allowed, [3, q_len, kv_len]))
        touched = np.zeros(layout.shape, bool)
        touched[head, q // block_size, kv // block_size] = True
        np.testing.assert_array_equal(layout, touched)


def test_mask_layout_of_a_function_has_bounded_memory():
    largest = []

    def window(head, q, kv):
        largest.append(np.broadcast(q, kv).size)
        return abs(q - kv) <= 64

    density = layouts.mask_layout(window, 8192, 32).mean()
    assert 0.01 < density < 0.03
    assert max(largest[1:]) <= 1 << 20 and sum(largest[1:]) == 8192**2


def test_a_layout_of_one_head_is_refused_where_the_mask_tells_heads_apart():
    by_head = masks.causal_mask() & (lambda head, q, kv: (q - kv) % 2**head == 0)
    for mask in by_head, masks.fixed_mask(32, 8, 2):
        with pytest.raises(ValueError, match="layout must have a head .* give heads="):
            layouts.mask_layout(mask, 64, 8)
    layout = layouts.mask_layout(by_head, 64, 8, heads=5)
    assert layout[:4].sum() == 4 * 36 and layout[4].sum() == 8 + 6 + 4 + 2


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: layouts.all_layout(0, 8), "q_len must be a positive integer, got 0"),
        (lambda: layouts.all_layout(64, -8), "block_size must be .*, got -8"),
        (lambda: layouts.all_layout(64, 8, heads=0), "heads must be .*, got 0"),
        (lambda: layouts.dense_layout(64, 8, 0), "kv_len must be .*, got 0"),
        (lambda: layouts.local_layout(64, 8, 0), "window must be .*, got 0"),
        (lambda: layouts.strided_layout(64, 8, 0), "stride must be .*, got 0"),
        (lambda: layouts.chunk_layout(64, 8, 0), "chunk must be .*, got 0"),
        (lambda: layouts.sink_layout(64, 8, 8, 0), "sinks must be .*, got 0"),
        (lambda: layouts.fixed_layout(64, 8, 12), "multiple of block_size=8, got 12"),
        (
            lambda: layouts.fixed_layout(64, 8, 32, heads=6),
            "heads must be a multiple of num_verts=4, got 6",
        ),
    ],
)
def test_layouts_name_what_does_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_layouts_docstrings_run():
    assert doctest.testmod(layouts).attempted
    assert not doctest.testmod(layouts).failed
