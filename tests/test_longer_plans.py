"""Plans for more positions than there are rows, and lengths that only a run knows."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import random_inputs
from tf_helpers import MODES, assert_same_bits, merged, run, run_with_gradients

import sparse_attention as sa

HEADS, LONGEST = 4, 200


def attention(plan, **options):
    def call(q, k, v):
        return sa.block_sparse_attention(
            q, k, v, plan, HEADS, return_lse=True, **options
        )

    return call


def arrays_of(q_len, kv_len=None):
    inputs = random_inputs(0, 2, q_len, kv_len, HEADS)
    arrays = [merged(x) for x in inputs[:3]]
    return arrays, [merged(inputs.do), inputs.dlse]


@pytest.mark.parametrize("length", [1, 8, 77, 130, 199])
@pytest.mark.parametrize("attn_mode", ["all", "local", "fixed"])
def test_a_longer_plan_is_that_of_the_length(path, attn_mode, length):
    check(attn_mode, length)


def check(attn_mode, length):
    """fixed has a plan by head."""
    plans = [
        sa.pattern_block_mask(attn_mode, n, HEADS, 8, 32, num_verts=2)
        for n in (LONGEST, length)
    ]
    arrays, d_arrays = arrays_of(length)
    longer, own = (run_with_gradients(attention(p), arrays, d_arrays) for p in plans)
    for got, expected in zip(tf.nest.flatten(longer), tf.nest.flatten(own)):
        assert got.shape == expected.shape
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=2.0**-18 * scale)


def test_queries_and_keys_may_have_lengths_of_their_own(path):
    layout = np.random.RandomState(0).rand(HEADS, 25, 13) < 0.5
    mask = sa.Mask(lambda head, q_idx, kv_idx: (q_idx + kv_idx + head) % 3 > 0)
    longer = sa.BlockMask(layout, mask, 8)
    own = sa.BlockMask(layout[:, :8, :5], mask, 8, q_len=59, kv_len=40)
    arrays, d_arrays = arrays_of(59, 40)
    results = [
        run_with_gradients(attention(p, kv_lengths=[33, 40]), arrays, d_arrays)
        for p in (longer, own)
    ]
    for got, expected in zip(*map(tf.nest.flatten, results)):
        np.testing.assert_allclose(got, expected, atol=2.0**-18)


def test_rules_hold_under_a_longer_plan(path):
    ids = np.sort(np.random.RandomState(1).randint(0, 3, [2, 77]), axis=1)
    rule = {
        "segment_ids": ids.astype(np.int32),
        "mask": np.random.RandomState(2).rand(2, 1, 77, 77) < 0.7,
        "alibi_slopes": np.full(HEADS, 0.1),
        "sinks": np.zeros(HEADS),
        "softmax_scale": np.full(HEADS, 0.2),
        "dropout_rate": 0.2,
        "dropout_seed": [1, 2],
    }
    arrays, d_arrays = arrays_of(77)
    results = []
    for length in (LONGEST, 77):
        call = attention(sa.pattern_block_mask("all", length, HEADS, 8), **rule)
        results.append(run_with_gradients(call, arrays, d_arrays))
    for got, expected in zip(*map(tf.nest.flatten, results)):
        np.testing.assert_allclose(got, expected, atol=2.0**-18)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "eager"])
def test_lengths_that_a_run_knows(path, mode):
    """One graph serves all lengths, and its gradients."""
    plan = sa.pattern_block_mask("local", LONGEST, HEADS, 8, 32)
    for length in (50, 120):
        arrays, d_arrays = arrays_of(length)

        def unknown(q, k, v):
            q, k, v = (
                tf.compat.v1.placeholder_with_default(x, [None, None, x.shape[2]])
                for x in (q, k, v)
            )
            o, lse = attention(plan)(q, k, v)
            assert o.shape.as_list() == [None, None, HEADS * 16]
            return o, lse

        def known(q, k, v):
            return attention(plan)(q, k, v)

        if mode == "function":
            signature = [tf.TensorSpec([None, None, HEADS * 16])] * 3
            unknown = tf.function(known, input_signature=signature)
        got = run_with_gradients(
            unknown, arrays, d_arrays, "graph" if mode == "graph" else "eager"
        )
        expected = run_with_gradients(known, arrays, d_arrays)
        assert_same_bits(got, expected)


def test_a_tensor_longer_than_its_plan_is_refused():
    plan = sa.pattern_block_mask("all", 64, HEADS, 8)
    strided = sa.pattern_block_mask("strided", 64, HEADS, 8, 8)
    with tf.Graph().as_default():
        q, short = tf.zeros([2, 72, 64]), tf.zeros([2, 40, 64])
        message = r"q must have time <= block_mask.q_len = 64, got shape \(2, 72, 64\)"
        with pytest.raises(ValueError, match=message):
            attention(plan)(q, q, q)
        message = (
            "q must have time = block_mask.q_len = 64, as the plan's row_stride is 8"
        )
        with pytest.raises(ValueError, match=message):
            attention(strided)(short, short, short)


def test_a_tensor_longer_than_its_plan_is_refused_in_a_run():
    plan = sa.pattern_block_mask("all", 64, HEADS, 8)

    def call(q):
        q = tf.compat.v1.placeholder_with_default(q, [None, None, 64])
        return attention(plan)(q, q, q)

    message = (
        "q_len and kv_len must be at most 64 and 64, for which the plan is made, got 72"
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        run(call, np.zeros([2, 72, 64], np.float32))
