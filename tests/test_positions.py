"""Rotary embeddings and ALiBi's slopes."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import DTYPES, assert_close, to_dtype
from tf_helpers import MODES, run, run_with_gradients

import sparse_attention as sa

BATCH, TIME, HEADS, HEAD_DIM = 2, 19, 3, 16


def by_hand(x, positions, base, dtype=np.float64):
    """Pairs of elements as complex numbers, turned."""
    half = HEAD_DIM // 2
    x = np.asarray(x).astype(dtype).reshape(BATCH, TIME, HEADS, 2, half)
    z = x[..., 0, :] + 1j * x[..., 1, :]
    waves = np.float64(base) ** (-np.arange(half) / half)
    angles = np.asarray(positions)[..., None] * waves
    z = z * np.exp(1j * angles)[..., None, :].astype(z.dtype)
    return np.stack([z.real, z.imag], axis=3).reshape(BATCH, TIME, -1)


def random_x(dtype="float32", seed=0):
    print("seed", seed)
    x = np.random.RandomState(seed).randn(BATCH, TIME, HEADS * HEAD_DIM)
    return to_dtype(x, dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_turn_and_its_gradient_equal_complex_numbers(dtype, mode):
    x, dy = random_x(dtype), random_x(dtype, seed=1)
    positions = np.arange(TIME)
    (got,), (dx,) = run_with_gradients(
        lambda x: [sa.rotary_embedding(x, HEADS)], [x], [dy], mode
    )
    for result, a, sign in ((got, x, 1), (dx, dy, -1)):
        oracle, plain = (
            by_hand(a, sign * positions, 10000.0, d) for d in (np.float64, np.float32)
        )
        assert result.dtype == x.dtype
        assert_close(result, oracle, to_dtype(plain, dtype), 2)


@pytest.mark.parametrize("shape", [[TIME], [BATCH, TIME]])
def test_positions_far_away_are_told_apart(shape):
    positions = np.random.RandomState(2).randint(10**6, 10**8, shape)
    x = random_x()
    got = run(
        lambda x, positions: sa.rotary_embedding(x, HEADS, positions, base=500.0),
        *(x, positions),
    )
    oracle, plain = (by_hand(x, positions, 500, d) for d in (np.float64, np.float32))
    assert_close(got, oracle, plain, 2)


def test_scores_tell_distances_alone():
    q, k = random_x(), random_x(seed=1)

    def scores(offset):
        positions = np.arange(TIME) + offset
        q64, k64 = (
            run(lambda x: sa.rotary_embedding(x, HEADS, positions), x).astype(float)
            for x in (q, k)
        )
        return q64[0] @ k64[0].T

    size = (np.abs(q[0]) @ np.abs(k[0]).T).max()
    assert np.abs(scores(0) - scores(1000)).max() < 8 * 2.0**-24 * size


def test_unknown_sizes_are_kept_unknown():
    @tf.function(input_signature=[tf.TensorSpec([None, None, HEADS * HEAD_DIM])])
    def turned(x):
        y = sa.rotary_embedding(x, HEADS)
        assert y.shape.as_list() == [None, None, HEADS * HEAD_DIM]
        return y

    x = random_x()
    got = run(turned, x)
    np.testing.assert_array_equal(got, run(lambda x: sa.rotary_embedding(x, HEADS), x))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"heads": 32}, ValueError, "x must be .* heads=32 .* even, got shape"),
        ({"x": np.zeros([2, 8])}, TypeError, "x must be float32.* got float64"),
        ({"x": np.zeros([2, 8], np.float32)}, ValueError, r"got shape \(2, 8\)"),
        ({"base": 0}, ValueError, "base must be positive, got 0"),
        ({"positions": np.zeros([3])}, TypeError, "positions must be integers"),
        ({"positions": np.zeros([3], int)}, ValueError, r"positions must be \[time\]"),
    ],
)
def test_wrong_arguments_are_errors(changes, error, message):
    with pytest.raises(error, match=message):
        sa.rotary_embedding(**{"x": random_x(), "heads": HEADS, **changes})


def test_slopes_are_those_of_the_paper():
    assert sa.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert sa.alibi_slopes(1).tolist() == [2.0**-8]
    sixteen = [2.0 ** (-i / 2) for i in range(1, 17)]
    np.testing.assert_array_equal(sa.alibi_slopes(16), np.float32(sixteen))
    twelve = [2.0**-i for i in range(1, 9)] + sixteen[0:8:2]
    np.testing.assert_array_equal(sa.alibi_slopes(np.int64(12)), np.float32(twelve))
    with pytest.raises(ValueError, match="heads must be a positive integer, got 0"):
        sa.alibi_slopes(0)
