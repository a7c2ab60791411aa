"""block_sparse_attention's rules: the op and TensorFlow's own ops, in all modes."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    DTYPES,
    RESULTS,
    assert_attention_close,
    check_twice_at_most,
    random_inputs,
)
from rules import BATCH, HEADS, KV_LEN, Q_LEN, RULES, random_mask
from tf_helpers import (
    MODES,
    assert_same_bits,
    merged,
    run,
    run_with_gradients,
    take_kernels_away,
)

import sparse_attention as sa

SINKS = {"sinks": np.array([0.5, -1.0, 2.0, 0.0])}
ALL = {**RULES, "sinks": SINKS}
TRAINED = ("relative_bias", "sinks")


def block_mask_of(attn_mode="fixed", heads=HEADS):
    return sa.pattern_block_mask(attn_mode, Q_LEN, heads, 8, 16, num_verts=2)


def check(rule, *arguments, **options):
    """Compares o, lse and all gradients under a rule with the float64 oracle."""
    check_twice_at_most(lambda seed: check_once(seed, rule, *arguments, **options))


def check_once(
    seed,
    rule,
    attn_mode="fixed",
    dtype="float32",
    mode="function",
    kv_heads=HEADS,
    **options,
):
    block_mask = block_mask_of(attn_mode)
    sizes = {"heads": HEADS, "kv_heads": kv_heads, "dtype": dtype}
    inputs = random_inputs(seed, BATCH, Q_LEN, KV_LEN, **sizes)
    rule = dict(rule)
    names = [name for name in TRAINED if name in rule]
    trained = [np.asarray(rule[name], np.float32) for name in names]
    others = {name: rule[name] for name in rule if name not in names}

    def attention(q, k, v, *trained):
        return sa.block_sparse_attention(
            *(q, k, v, block_mask, HEADS, kv_heads),
            **options,
            **others,
            **dict(zip(names, trained)),
            return_lse=True,
        )

    arrays = [merged(x) for x in inputs[:3]] + trained
    d_arrays = [merged(inputs.do), inputs.dlse]
    outputs, gradients = run_with_gradients(attention, arrays, d_arrays, mode)
    like = (inputs.do, inputs.dlse, *inputs[:3], *trained)
    results = {
        name: x.reshape(y.shape)
        for name, x, y in zip(
            (*RESULTS, *("d" + name for name in names)), [*outputs, *gradients], like
        )
    }
    mask = block_mask.to_dense() & rule.pop("mask", True)
    assert_attention_close(results, inputs, mask, by_row=True, **rule, **options)


# ---- numbers ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_each_rule_matches_oracle(path, name, dtype):
    check(ALL[name], dtype=dtype)
    check(ALL[name], "strided", dtype=dtype, kv_heads=2)


@pytest.mark.parametrize("mode", MODES)
def test_all_rules_together_match_oracle_in_every_mode(path, mode):
    rule = {name: value for rule in ALL.values() for name, value in rule.items()}
    check(rule, "all", mode=mode, kv_heads=2, kv_lengths=[77, 40, 60, 50])


@pytest.mark.parametrize("pair", list(itertools.combinations(ALL, 2)), ids=str)
def test_each_pair_of_rules_matches_oracle(pair):
    check({**ALL[pair[0]], **ALL[pair[1]]})


def test_the_offset_moves_the_queries(path):
    rule = {**RULES["alibi_slopes"], **RULES["relative_bias"], **RULES["dropout"]}
    check({**rule, "q_offset": 5}, "local")


@pytest.mark.parametrize(
    "shape", [(1, KV_LEN), (HEADS, 1, KV_LEN), (BATCH, 1, 1, KV_LEN)]
)
def test_masks_of_lower_rank_broadcast(path, shape):
    check({"mask": random_mask(*shape)}, "all")


def test_kernels_and_fallback_drop_the_same_weights(monkeypatch):
    block_mask = block_mask_of("all")
    x = np.random.RandomState(0).randn(2, Q_LEN, HEADS * 8).astype(np.float32)
    identity = np.zeros([2, Q_LEN, HEADS, 80], np.float32)
    identity[:, np.arange(Q_LEN), :, np.arange(Q_LEN)] = 1  # o holds the weights
    options = {"dropout_rate": 0.4, "dropout_seed": [1 << 40, -(1 << 50)]}

    def attention(q, v):
        return sa.block_sparse_attention(q, q, v, block_mask, HEADS, **options)

    kernels = run(attention, x, merged(identity))
    take_kernels_away(monkeypatch)
    fallback = run(attention, x, merged(identity))
    np.testing.assert_array_equal(kernels == 0, fallback == 0)


@pytest.mark.parametrize("shape", [[], [HEADS]])
def test_a_trained_scale_has_its_gradient(path, shape):
    block_mask, inputs = block_mask_of("all"), random_inputs(0, 1, Q_LEN, heads=HEADS)
    arrays = [merged(x) for x in inputs[:3]]
    scale = np.full(shape, 0.25, np.float32)

    def attention(scale, q, k, v):
        return [
            sa.block_sparse_attention(q, k, v, block_mask, HEADS, softmax_scale=scale)
        ]

    def plain(q, k, v):
        return [
            sa.block_sparse_attention(q, k, v, block_mask, HEADS, softmax_scale=0.25)
        ]

    do = [merged(inputs.do)]
    (o,), (dscale, dq, dk, dv) = run_with_gradients(attention, [scale, *arrays], do)
    (want,), (want_dq, want_dk, want_dv) = run_with_gradients(plain, arrays, do)
    for got, expected in ((o, want), (dq, want_dq), (dk, want_dk), (dv, want_dv)):
        np.testing.assert_allclose(got, expected, atol=2.0**-20)
    by_head = (want_dq * arrays[0]).reshape(Q_LEN, HEADS, -1).sum((0, 2)) / 0.25
    expected = by_head if shape else by_head.sum()
    np.testing.assert_allclose(dscale, expected, rtol=2.0**-14)


def test_two_runs_give_the_same_bits_and_another_seed_others():
    block_mask, inputs = block_mask_of(), random_inputs(0, 2, Q_LEN, heads=HEADS)
    arrays = [merged(x) for x in inputs[:3]]

    def results(seed):
        def attention(q, k, v):
            options = {"dropout_rate": 0.2, "dropout_seed": seed}
            return [sa.block_sparse_attention(q, k, v, block_mask, HEADS, **options)]

        return run_with_gradients(attention, arrays, [merged(inputs.do)])

    assert_same_bits(results([3, 4]), results([3, 4]))
    assert np.abs(results([3, 4])[0][0] - results([3, 5])[0][0]).max() > 0.1
    assert np.abs(results([3, 4])[0][0] - results([4, 4])[0][0]).max() > 0.1


# ---- errors ----


@pytest.mark.parametrize(
    "error,message,options",
    [
        (
            TypeError,
            "mask must be bool, True = attend, got float32",
            {"mask": np.ones([Q_LEN, KV_LEN], np.float32)},
        ),
        (
            ValueError,
            r"mask must broadcast to \[batch, heads, q_len, kv_len\] = \[2, 4, 77, 77\], got",
            {"mask": np.ones([2, KV_LEN], bool)},
        ),
        (
            ValueError,
            "mask must have rank 4 or less",
            {"mask": np.ones([1, 1, 1, 1, 1], bool)},
        ),
        (
            TypeError,
            "segment_ids of q must be integers, got float32",
            {"segment_ids": np.zeros([2, Q_LEN], np.float32)},
        ),
        (
            ValueError,
            r"segment_ids of q must have shape \[batch, q_len\] = \[2, 77\]",
            {"segment_ids": np.zeros([2, 7], np.int32)},
        ),
        (
            ValueError,
            "logit_softcap must be positive and finite, or None, got 0",
            {"logit_softcap": 0},
        ),
        (
            TypeError,
            "logit_softcap must be a number, got 'big'",
            {"logit_softcap": "big"},
        ),
        (
            ValueError,
            r"alibi_slopes must have shape \[heads\] = \[4\], got \(3,\)",
            {"alibi_slopes": np.ones(3)},
        ),
        (
            TypeError,
            "alibi_slopes must be floating point, got int64",
            {"alibi_slopes": np.ones(4, np.int64)},
        ),
        (
            ValueError,
            r"relative_bias must have shape \[heads=4 or 1, 2 R - 1\], got \(4, 6\)",
            {"relative_bias": np.ones([4, 6])},
        ),
        (
            ValueError,
            r"relative_bias must have shape \[heads=4 or 1, 2 R - 1\], got \(2, 5\)",
            {"relative_bias": np.ones([2, 5])},
        ),
        (ValueError, r"sinks must have shape \[heads\] = \[4\]", {"sinks": np.ones(5)}),
        (
            ValueError,
            r"dropout_rate must be in \[0, 1\), got 1.0",
            {"dropout_rate": 1.0, "dropout_seed": [0, 0]},
        ),
        (
            ValueError,
            "dropout_seed must be given with dropout_rate=0.1",
            {"dropout_rate": 0.1},
        ),
        (
            ValueError,
            r"dropout_seed must have shape \[2\]",
            {"dropout_rate": 0.1, "dropout_seed": [1, 2, 3]},
        ),
        (
            TypeError,
            "dropout_seed must be integers, got float",
            {"dropout_rate": 0.1, "dropout_seed": [0.5, 1.0]},
        ),
        (TypeError, "q_offset must be an integer, got 1.5", {"q_offset": 1.5}),
        (
            ValueError,
            r"softmax_scale must have shape \[\] or \[heads=4\]",
            {"softmax_scale": np.ones(3, np.float32)},
        ),
        (
            TypeError,
            "softmax_scale must be floating point, got string",
            {"softmax_scale": "big"},
        ),
    ],
)
def test_bad_rules_are_refused(error, message, options):
    with tf.Graph().as_default():
        x = tf.zeros([2, Q_LEN, HEADS * 8])
        with pytest.raises(error, match=message):
            sa.block_sparse_attention(x, x, x, block_mask_of(), HEADS, **options)


def test_segments_of_lengths_that_differ_come_in_pairs():
    block_mask = sa.BlockMask(np.ones([1, 2, 4], bool), None, 8)
    q, k = np.zeros([2, 16, 16], np.float32), np.zeros([2, 32, 16], np.float32)
    ids = np.zeros([2, 16], np.int32), np.zeros([2, 32], np.int32)

    def attention(q, k, segment_ids):
        return sa.block_sparse_attention(
            q, k, k, block_mask, 2, segment_ids=segment_ids
        )

    with pytest.raises(ValueError, match="segment_ids must be a pair"):
        run(lambda q, k: attention(q, k, ids[0]), q, k)
    assert run(lambda q, k: attention(q, k, ids), q, k).shape == (2, 16, 16)
