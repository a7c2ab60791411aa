"""OpenAI's small functions: the same arguments and results, and clear errors."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import PATTERNS, random_inputs
from tf_helpers import MODES, run

import sparse_attention as sa


def rule(attn_mode, i, j, ctx):
    """The table of patterns, one element at a time."""
    return (
        j <= i
        and {
            "all": True,
            "local": i - j < ctx,
            "strided": (i - j) % ctx == 0,
        }[attn_mode]
    )


# ---- masks ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attn_mode", ["all", "local", "strided"])
def test_attn_mask_follows_the_rule_for_known_and_unknown_lengths(attn_mode, mode):
    for n, ctx in ((7, 3), (8, 8), (5, 9), (1, 1)):
        want = np.array(
            [[rule(attn_mode, i, j, ctx) for j in range(n)] for i in range(n)]
        )
        known = run(lambda: sa.get_attn_mask(n, attn_mode, ctx), mode=mode)
        unknown = run(
            lambda n: sa.get_attn_mask(n, attn_mode, ctx), np.int32(n), mode=mode
        )
        for got in (known, unknown):
            assert got.dtype == np.float32 and got.shape == (1, 1, n, n)
            np.testing.assert_array_equal(got[0, 0], want)


def test_fixed_attn_mask_is_drawn_as_in_the_paper():
    # Windows of 4 blocks of 1; the head picks the last block or the one before it.
    got = run(lambda: sa.get_attn_mask(8, "fixed", 4, 2, blocksize=1, num_verts=2))
    drawing = ["".join(".#"[int(x)] for x in row) for row in np.concatenate(got[0], 1)]
    assert drawing == [
        "#.......#.......",
        "##......##......",
        "###.....###.....",
        "####....####....",
        "...##.....#.#...",
        "...###....#.##..",
        "...####...#.###.",
        "...#####..#.####",
    ]


def test_fixed_attn_mask_has_heads():
    def shape(**options):
        return run(
            lambda: sa.get_attn_mask(16, "fixed", 8, blocksize=2, **options)
        ).shape

    assert shape(heads=8) == (1, 8, 16, 16)
    assert shape() == (1, 4, 16, 16)
    assert shape(num_verts=1, vertsize=2) == (1, 1, 16, 16)


@pytest.mark.parametrize(
    "message, arguments",
    [
        (
            "attn_mode must be 'all', 'local', 'strided' or 'fixed', got 'dense'",
            ["dense"],
        ),
        ("local_attn_ctx must be a positive integer, got None", ["local"]),
        ("local_attn_ctx must be a positive integer, got 0", ["strided", 0]),
        ("num_verts must divide heads=6, got 4", ["fixed", 128, 6]),
        ("multiple of block_size=32, got 100", ["fixed", 100]),
    ],
)
def test_attn_mask_refuses(message, arguments):
    with pytest.raises(ValueError, match=message):
        run(lambda: sa.get_attn_mask(256, *arguments))


@pytest.mark.parametrize("attn_mode", PATTERNS)
def test_callback_gives_the_seeds_blocks(attn_mode):
    size, ctx = 4, 6
    callback = sa.get_callback(attn_mode, ctx)
    for q_block in range(4):
        for kv_block in range(q_block + 1):
            want = np.ones([size, size], bool)
            for q, k in np.ndindex(size, size):
                i, j = q_block * size + q, kv_block * size + k
                if q_block == kv_block and k > q:
                    want[q, k] = False
                if attn_mode == "local" and not rule("local", i, j, ctx):
                    want[q, k] = False
            got = callback((size, size), 0, q_block, kv_block, 0)
            assert got.dtype == bool
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("attn_mode must be .* got 'dense'", ["dense"]),
        ("local_attn_ctx must be a positive integer, got None", ["local"]),
    ],
)
def test_callback_refuses(message, arguments):
    with pytest.raises(ValueError, match=message):
        sa.get_callback(*arguments)


# ---- shapes ----


@pytest.mark.parametrize("mode", MODES)
def test_strided_transpose_moves_positions(mode):
    ctx, size = 4, 2
    x = np.arange(3 * 24 * 5, dtype=np.float32).reshape(3, 24, 5)
    got = run(lambda x: sa.strided_transpose(x, 24, ctx, size), x, mode=mode)
    for a, b in np.ndindex(24 // ctx, ctx):
        np.testing.assert_array_equal(got[:, b * (24 // ctx) + a], x[:, a * ctx + b])


def test_strided_transpose_refuses_lengths_that_do_not_divide():
    x = np.zeros([1, 24, 8], np.float32)
    for arguments, message in (
        ((24, 5, 2), r"n_ctx must be a multiple of .* = 5 \* 2, got 24"),
        ((24, 4, 4), r"n_ctx must be a multiple of .* = 4 \* 4, got 24"),
        ((24, 0, 4), "local_attn_ctx must be a positive integer, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(lambda x: sa.strided_transpose(x, *arguments), x)


@pytest.mark.parametrize("mode", MODES)
def test_heads_split_and_merge(mode):
    x = random_inputs(0, 2, 6, heads=3, head_dim=4).q  # [batch, time, heads, dim]
    flat = x.reshape(2, 6, 12)
    for function, given, want in (
        (lambda x: sa.split_states(x, 3), flat, x),
        (sa.merge_states, x, flat),
        (lambda x: sa.split_heads(x, 3), flat, x.transpose(0, 2, 1, 3)),
        (sa.merge_heads, x.transpose(0, 2, 1, 3), flat),
    ):
        np.testing.assert_array_equal(run(function, given, mode=mode), want)


def test_split_refuses_a_width_that_does_not_divide():
    x = np.zeros([1, 2, 10], np.float32)
    for function in (sa.split_states, sa.split_heads):
        with pytest.raises(ValueError, match="must be a multiple of 3, got 10"):
            run(lambda x: function(x, 3), x)


def test_shapes_may_be_unknown():
    x = random_inputs(0, 2, 6, heads=3, head_dim=4).q

    def unknown(x):
        x = tf.compat.v1.placeholder_with_default(x, [None] * 4)
        batch, *_ = sa.shape_list(x)
        assert isinstance(batch, tf.Tensor)
        merged = sa.merge_heads(x)
        merged = tf.compat.v1.placeholder_with_default(merged, [None, None, 24])
        return sa.shape_list(x), sa.split_heads(merged, 4)

    shape, got = run(unknown, x)
    assert shape == [2, 6, 3, 4]
    want = x.transpose(0, 2, 1, 3).reshape(2, 3, 6 * 4)
    assert got.shape == (2, 4, 3, 6) and want.size == got.size


@pytest.mark.parametrize("mode", MODES)
def test_shape_list_gives_ints_for_what_is_known(mode):
    shapes = []
    run(lambda x: shapes.append(sa.shape_list(x)) or x, np.zeros([2, 3, 4]), mode=mode)
    assert shapes == [[2, 3, 4]] and all(type(n) is int for n in shapes[0])
