"""The oracle against loops and finite differences; the tolerance against errors."""

import doctest
import math

import numpy as np
import pytest
from helpers import (
    DTYPES,
    assert_close,
    np_dtype,
    plain_attention_bwd,
    plain_attention_fwd,
    random_inputs,
    to_dtype,
)

from sparse_attention.plan import reference
from sparse_attention.plan.dropout import kept_weights
from sparse_attention.plan.reference import attention_bwd, attention_fwd

SHAPES = {
    "square": {"q_len": 7, "head_dim": 4},
    "more keys": {"q_len": 3, "kv_len": 9, "head_dim": 4},
    "more queries": {"q_len": 9, "kv_len": 4, "head_dim": 4},
    "grouped heads": {"q_len": 3, "heads": 6, "kv_heads": 2, "head_dim": 4},
    "wide v": {"q_len": 3, "head_dim": 4, "head_dim_v": 12},
    "one": {"batch": 1, "q_len": 1, "heads": 1, "head_dim": 1},
}


def to_float64(x):
    return np.asarray(x).astype(np.float64)


def random_mask(x, seed=0):
    """bool [heads, q_len, kv_len], its second row empty."""
    mask = np.random.RandomState(seed).random_sample(
        [x.q.shape[2], x.q.shape[1], x.k.shape[1]]
    )
    mask[:, 1:2] = 1
    return mask < 0.6


def loops_fwd(q, k, v, mask, scale, kv_lengths):
    """Attention in plain Python, one multiplication at a time."""
    batch, q_len, heads, head_dim = q.shape
    o = np.zeros([batch, q_len, heads, v.shape[3]])
    lse = np.full([batch, heads, q_len], -np.inf)
    for b, h, i in np.ndindex(batch, heads, q_len):
        kv_head = h * k.shape[2] // heads
        weights = {}
        for j in range(k.shape[1]):
            if mask[h, i, j] and j < kv_lengths[b]:
                s = sum(
                    float(q[b, i, h, d] * k[b, j, kv_head, d]) for d in range(head_dim)
                )
                weights[j] = math.exp(s * scale)
        total = sum(weights.values())
        if weights:
            lse[b, h, i] = math.log(total)
        for j, weight in weights.items():
            o[b, i, h] += weight / total * v[b, j, kv_head].astype(np.float64)
    return o, lse


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("scale", [None, 0.3])
def test_forward_matches_loops(shape, scale):
    x = random_inputs(seed=1, **SHAPES[shape])
    q, k, v = (to_float64(part) for part in x[:3])
    mask = random_mask(x)
    kv_lengths = np.arange(len(q)) + 2
    expected = loops_fwd(q, k, v, mask, scale or 1 / math.sqrt(q.shape[3]), kv_lengths)
    got = attention_fwd(q, k, v, mask, scale, kv_lengths)
    plain = plain_attention_fwd(*x[:3], mask, scale, kv_lengths)
    for name, g, e, p in zip(["o", "lse"], got, expected, plain):
        print(name)
        assert g.dtype == np.float64
        assert_close(g.astype(np.float32), e, p, factor=2)


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("with_dlse", [True, False])
def test_backward_matches_finite_differences(shape, with_dlse):
    x = random_inputs(seed=2, **SHAPES[shape])
    q, k, v, do, dlse = (to_float64(part) for part in x)
    mask, scale = random_mask(x), 0.4
    kv_lengths = np.arange(len(q)) + 2

    def loss(*qkv):
        o, lse = attention_fwd(*qkv, mask, scale, kv_lengths)
        is_finite = np.isfinite(lse)
        return np.sum(o * do) + with_dlse * np.sum(lse[is_finite] * dlse[is_finite])

    given = dlse if with_dlse else None
    got = attention_bwd(q, k, v, mask, do, given, scale, kv_lengths)
    plain = plain_attention_bwd(*x[:3], mask, x.do, given, scale, kv_lengths)
    for n, name in enumerate(["dq", "dk", "dv"]):
        expected = np.zeros(got[n].shape)
        for at in np.ndindex(expected.shape):
            sides = []
            for step in 1e-5, -1e-5:
                moved = [q.copy(), k.copy(), v.copy()]
                moved[n][at] += step
                sides.append(loss(*moved))
            expected[at] = (sides[0] - sides[1]) / 2e-5
        print(name)
        assert_close(got[n].astype(np.float32), expected, plain[n], factor=3)


# ---- what stands between q kT and the softmax ----

RULE = {
    "logit_softcap": 1.5,
    "alibi_slopes": np.array([0.25, 1.0]),
    "relative_bias": np.random.RandomState(0).randn(2, 5),
    "segment_ids": (
        np.array([[0, 0, 1, 1, 1], [2, 2, 2, -1, -1]]),
        np.array([[0, 0, 1, 1, 2, 2], [2, 2, 2, 2, 0, -1]]),
    ),
    "sinks": np.array([0.5, -1.0]),
    "dropout_rate": 0.3,
    "dropout_seed": [7, 9],
    "q_offset": 1,
}


def test_rules_match_loops():
    x = random_inputs(seed=8, q_len=5, kv_len=6, head_dim=4)
    q, k, v = (to_float64(part) for part in x[:3])
    o, lse = attention_fwd(q, k, v, **RULE)
    kept = kept_weights(0.3, [7, 9], 2, 2, 5, 6, q_offset=1)
    for b, h, i in np.ndindex(2, 2, 5):
        weights = {}
        for j in range(6):
            s = 1.5 * math.tanh(float(q[b, i, h] @ k[b, j, h]) / 2 / 1.5)
            s -= RULE["alibi_slopes"][h] * abs(i + 1 - j)
            s += RULE["relative_bias"][h, min(max(i + 1 - j, -2), 2) + 2]
            ids = RULE["segment_ids"][0][b, i], RULE["segment_ids"][1][b, j]
            if ids[0] == ids[1] >= 0:
                weights[j] = math.exp(s)
        total = math.exp(RULE["sinks"][h]) + sum(weights.values())
        np.testing.assert_allclose(lse[b, h, i], math.log(total), rtol=1e-12)
        expected = np.zeros(4)
        for j, weight in weights.items():
            expected += weight / total * kept[b, h, i, j] / 0.7 * v[b, j, h]
        np.testing.assert_allclose(o[b, i, h], expected, atol=1e-12)


def test_gradients_of_rules_match_finite_differences():
    x = random_inputs(seed=9, q_len=5, kv_len=6, head_dim=4)
    q, k, v, do, dlse = (to_float64(part) for part in x)
    inputs = [q, k, v, RULE["relative_bias"], RULE["sinks"]]

    def loss(q, k, v, bias, sinks):
        given = dict(RULE, relative_bias=bias, sinks=sinks)
        o, lse = attention_fwd(q, k, v, **given)
        return np.sum(o * do) + np.sum(lse * dlse)

    got = attention_bwd(q, k, v, None, do, dlse, **RULE)
    assert [g.shape for g in got] == [x.shape for x in inputs]
    for n, gradient in enumerate(got):
        for at in np.ndindex(gradient.shape):
            sides = []
            for step in 1e-5, -1e-5:
                moved = [x.copy() for x in inputs]
                moved[n][at] += step
                sides.append(loss(*moved))
            expected = (sides[0] - sides[1]) / 2e-5
            np.testing.assert_allclose(gradient[at], expected, atol=1e-7)


def test_a_row_with_no_key_gives_zeros_and_minus_infinity():
    x = random_inputs(seed=3, q_len=4)
    mask = np.ones([4, 4], bool)
    mask[2] = False
    o, lse = attention_fwd(x.q, x.k, x.v, mask)
    assert not o[:, 2].any() and o[:, [0, 1, 3]].all()
    assert np.isneginf(lse[:, :, 2]).all()
    assert np.isfinite(lse[:, :, [0, 1, 3]]).all()
    dq, dk, dv = attention_bwd(x.q, x.k, x.v, mask, x.do, x.dlse)
    assert not dq[:, 2].any() and dq[:, [0, 1, 3]].all()
    other = x.do.copy()
    other[:, 2] = 1e3
    _, other_dk, other_dv = attention_bwd(x.q, x.k, x.v, mask, other, x.dlse)
    np.testing.assert_array_equal(other_dk, dk)
    np.testing.assert_array_equal(other_dv, dv)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_masked_keys_do_not_leak(bad):
    x = random_inputs(seed=4, q_len=6)
    mask = np.tril(np.ones([6, 6], bool))
    clean = attention_fwd(*x[:3], mask) + attention_bwd(*x[:3], mask, x.do, x.dlse)
    k, v = x.k.copy(), x.v.copy()
    k[:, 4] = v[:, 4] = bad  # queries 4 and 5 attend to it
    o, lse = attention_fwd(x.q, k, v, mask)
    dq, _, _ = attention_bwd(x.q, k, v, mask, x.do, x.dlse)
    np.testing.assert_array_equal(o[:, :4], clean[0][:, :4])
    np.testing.assert_array_equal(lse[:, :, :4], clean[1][:, :, :4])
    np.testing.assert_array_equal(dq[:, :4], clean[2][:, :4])
    assert not np.isfinite(o[:, 4:]).any()
    o, _ = attention_fwd(x.q, x.k, v, mask)
    np.testing.assert_array_equal(o[:, :4], clean[0][:, :4])
    assert not np.isfinite(o[:, 4:]).any()
    q, do = x.q.copy(), x.do.copy()
    q[:, 2] = do[:, 2] = bad  # it does not attend to keys 3 to 5
    _, dk, dv = attention_bwd(q, x.k, x.v, mask, do, x.dlse)
    np.testing.assert_array_equal(dk[:, 3:], clean[3][:, 3:])
    np.testing.assert_array_equal(dv[:, 3:], clean[4][:, 3:])


def test_kv_lengths_are_a_mask():
    x = random_inputs(seed=5, batch=3, q_len=6, kv_len=8)
    mask = random_mask(x)
    kv_lengths = [0, 5, 8]
    got = attention_fwd(*x[:3], mask, None, kv_lengths)
    got += attention_bwd(*x[:3], mask, x.do, x.dlse, None, kv_lengths)
    for b, length in enumerate(kv_lengths):
        one = [part[b : b + 1] for part in x]
        shorter = mask & (np.arange(8) < length)
        expected = attention_fwd(*one[:3], shorter)
        expected += attention_bwd(*one[:3], shorter, *one[3:])
        for g, e in zip(got, expected):
            np.testing.assert_array_equal(g[b], e[0])


def test_grouped_heads_are_repeated_heads():
    x = random_inputs(seed=6, heads=4, kv_heads=2, q_len=5)
    k, v = np.repeat(x.k, 2, axis=2), np.repeat(x.v, 2, axis=2)
    mask = random_mask(x)
    for got, expected in zip(
        attention_fwd(*x[:3], mask), attention_fwd(x.q, k, v, mask)
    ):
        np.testing.assert_array_equal(got, expected)
    dq, dk, dv = attention_bwd(*x[:3], mask, x.do, x.dlse)
    repeated = attention_bwd(x.q, k, v, mask, x.do, x.dlse)
    np.testing.assert_array_equal(dq, repeated[0])
    for got, expected in (dk, repeated[1]), (dv, repeated[2]):
        np.testing.assert_array_equal(got, expected[:, :, 0::2] + expected[:, :, 1::2])


def test_values_of_one_give_one():
    x = random_inputs(seed=7, q_len=9)
    o, _ = attention_fwd(x.q, x.k, np.ones_like(x.v))
    ones = np.ones(o.shape)
    assert_close(o.astype(np.float32), ones, ones, factor=2)


def test_large_scores_do_not_overflow():
    q = np.full([1, 2, 1, 1], 300.0)
    k = np.array([200.0, -200.0]).reshape(1, 2, 1, 1)
    o, lse = attention_fwd(q, k, v=k)
    np.testing.assert_array_equal(o, np.full([1, 2, 1, 1], 200.0))
    np.testing.assert_array_equal(lse, np.full([1, 1, 2], 60000.0))


@pytest.mark.parametrize(
    "q, k, v, message",
    [
        ([2, 4, 8], [1, 4, 2, 8], [1, 4, 2, 8], r"q must be .*, got shape \(2, 4, 8\)"),
        ([1, 4, 2, 8], [2, 4, 2, 8], [2, 4, 2, 8], "shapes do not fit: q .*1, 4, 2, 8"),
        ([1, 4, 2, 8], [1, 4, 2, 9], [1, 4, 2, 8], "shapes do not fit"),
        ([1, 4, 2, 8], [1, 4, 2, 8], [1, 5, 2, 8], "shapes do not fit"),
        ([1, 4, 3, 8], [1, 4, 2, 8], [1, 4, 2, 8], "heads .* of kv_heads=2, got 3"),
    ],
)
def test_reference_names_shapes_that_do_not_fit(q, k, v, message):
    with pytest.raises(ValueError, match=message):
        attention_fwd(np.ones(q), np.ones(k), np.ones(v))


def test_reference_docstrings_run():
    assert doctest.testmod(reference).attempted
    assert not doctest.testmod(reference).failed


# ---- the tolerance ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_plain_attention_is_right_within_its_dtype(dtype, shape):
    x = random_inputs(seed=8, dtype=dtype, **SHAPES[shape])
    mask = random_mask(x)
    o, lse = plain_attention_fwd(*x[:3], mask)
    grads = plain_attention_bwd(*x[:3], mask, x.do, x.dlse)
    oracle_o, oracle_lse = attention_fwd(*x[:3], mask)
    oracle_grads = attention_bwd(*x[:3], mask, x.do, x.dlse)
    assert o.dtype == np_dtype(dtype)
    assert lse.dtype == np.float32
    assert_close(o, oracle_o, to_dtype(oracle_o, dtype), factor=2)
    assert_close(lse, oracle_lse, oracle_lse.astype(np.float32), factor=2)
    for got, oracle in zip(grads, oracle_grads):
        assert got.dtype == np_dtype(dtype)
        assert_close(got, oracle, to_dtype(oracle, dtype), factor=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_assert_close_draws_the_line_at_two_roundings(dtype):
    oracle = np.array([1.0, -0.5, -np.inf])
    eps = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    exact = to_dtype(oracle, dtype)
    assert_close(to_dtype(oracle + [2 * eps, 0, 0], dtype), oracle, exact, factor=2)
    with pytest.raises(AssertionError):
        assert_close(to_dtype(oracle + [3 * eps, 0, 0], dtype), oracle, exact, factor=2)
    # A plain implementation that errs by 4 roundings allows factor times as many more.
    plain = to_dtype(oracle + [0, 4 * eps, 0], dtype)
    assert_close(to_dtype(oracle + [14 * eps, 0, 0], dtype), oracle, plain, factor=3)
    with pytest.raises(AssertionError):
        assert_close(
            to_dtype(oracle + [15 * eps, 0, 0], dtype), oracle, plain, factor=3
        )


def test_assert_close_accepts_no_nan_no_other_infinity_and_no_other_shape():
    oracle = np.array([1.0, -np.inf])
    good = oracle.astype(np.float32)
    assert_close(good, oracle, good, factor=2)
    for bad in [np.nan, -np.inf], [1.0, np.nan], [1.0, np.inf], [1.0, -3e38]:
        with pytest.raises(AssertionError):
            assert_close(np.array(bad, np.float32), oracle, good, factor=2)
    with pytest.raises(AssertionError):
        assert_close(good[:1], oracle, good, factor=2)


def test_scores_are_no_mask():
    x = np.zeros([1, 4, 1, 8])
    with pytest.raises(TypeError, match="mask must be True or False.*-inf"):
        reference.attention_fwd(x, x, x, np.where(np.tri(4), 0.0, -np.inf))
