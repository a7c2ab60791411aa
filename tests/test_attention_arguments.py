"""What block_sparse_attention takes, and what it refuses by name."""

import re

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context
from tf_helpers import (
    MODES,
    assert_same_bits,
    attention_on,
    pattern,
    random_qkv,
    run,
    run_with_gradients,
)

import sparse_attention as sa
from sparse_attention.native import loader


def test_attention_accepts_arrays_lists_and_variables():
    block_mask = sa.BlockMask(np.ones([1, 1]), None, 8)
    arrays = random_qkv(block_mask)
    want = run(lambda *x: sa.block_sparse_attention(*x, block_mask, 2), *arrays)

    def from_others():
        q, k, v = arrays
        k, v = k.tolist(), tf.compat.v1.get_variable("v", initializer=v)
        int64 = np.array([8, 8])
        return sa.block_sparse_attention(q, k, v, block_mask, 2, kv_lengths=int64)

    assert_same_bits(run(from_others), want)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_batch_may_be_dynamic_and_empty(mode, batch):
    block_mask = pattern("local")
    arrays = random_qkv(block_mask, batch=3)
    do = np.ones_like(arrays[0])
    attention = attention_on(block_mask, 2)
    (want_o, want_lse), want = run_with_gradients(
        attention, arrays, [do, np.zeros([3, 2, 72], np.float32)]
    )

    def with_unknown_batch(*tensors):
        if mode != "eager":
            tensors = [
                tf.compat.v1.placeholder_with_default(x, [None, 72, 16])
                for x in tensors
            ]
        o, lse = attention(*tensors)
        assert mode == "eager" or o.shape.as_list() == [None, 72, 16]
        assert mode == "eager" or lse.shape.as_list() == [None, 2, 72]
        return o, lse

    (o, lse), got = run_with_gradients(
        with_unknown_batch,
        [x[:batch] for x in arrays],
        [do[:batch], np.zeros([batch, 2, 72], np.float32)],
        mode,
    )
    assert_same_bits([o, lse], [want_o[:batch], want_lse[:batch]])
    assert_same_bits(got, [x[:batch] for x in want])


def test_one_function_serves_every_batch():
    block_mask = pattern("all")
    with context.eager_mode():
        traces = []

        @tf.function(input_signature=[tf.TensorSpec([None, 72, 16])] * 3)
        def attention(q, k, v):
            traces.append(1)
            return sa.block_sparse_attention(q, k, v, block_mask, 2)

        for batch in (2, 0, 5):
            arrays = random_qkv(block_mask, batch=batch)
            got = attention(*map(tf.constant, arrays)).numpy()
            want = run(lambda *x: sa.block_sparse_attention(*x, block_mask, 2), *arrays)
            assert_same_bits(got, want)
    assert len(traces) == 1


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


GOOD = {
    "q": zeros(2, 16, 32),
    "k": zeros(2, 24, 32),
    "v": zeros(2, 24, 32),
    "block_mask": sa.BlockMask(np.ones([1, 2, 3]), None, 8),
    "heads": 4,
}
TWO_HEADS = sa.BlockMask(np.ones([2, 2, 3]), None, 8)


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (ValueError, "q must have rank 3, .*, got shape (2, 16)", {"q": zeros(2, 16)}),
        (ValueError, "v must have rank 3", {"v": zeros(2, 24, 4, 8)}),
        (TypeError, "q must be one of float32, float16, bfloat16, got float64",
         {"q": zeros(2, 16, 32, dtype=np.float64)}),
        (TypeError, "q must be one of .*, got int32",
         {"q": zeros(2, 16, 32, dtype=np.int32)}),
        (TypeError, "k must have q's dtype float32, got float16",
         {"k": zeros(2, 24, 32, dtype=np.float16)}),
        (ValueError, "q must have time <= block_mask.q_len = 16, got shape (2, 17, 32)",
         {"q": zeros(2, 17, 32)}),
        (ValueError, "v must have k's time 24, got shape (2, 16, 32)",
         {"v": zeros(2, 16, 32)}),
        (ValueError, "q must have width = 3 heads .* got shape (2, 16, 32)",
         {"heads": 3}),
        (ValueError, "q must have width = 8 heads .* multiple of 8 and at most 256",
         {"heads": 8}),
        (ValueError, "q must have width = 1 heads .* got shape (2, 16, 264)",
         {"q": zeros(2, 16, 264), "heads": 1}),
        (ValueError, "q must have width", {"q": zeros(2, 16, 0)}),
        (ValueError, "k must have q's head dim 8, got 16", {"k": zeros(2, 24, 64)}),
        (ValueError, "same batch, got [2, 3, 2]", {"k": zeros(3, 24, 32)}),
        (ValueError, "heads must be a positive integer, got 0", {"heads": 0}),
        (ValueError, "heads must be a positive integer, got 2.0", {"heads": 2.0}),
        (ValueError, "kv_heads must divide heads=4, got 3", {"kv_heads": 3}),
        (ValueError, "block_mask must have 1 head or heads=4, got 2",
         {"block_mask": TWO_HEADS}),
        (TypeError, "block_mask must be a BlockMask, got ndarray",
         {"block_mask": np.ones([1, 2, 3])}),
        (TypeError, "softmax_scale must be floating point, got string",
         {"softmax_scale": "big"}),
        (TypeError, "kv_lengths must be int32, got float32",
         {"kv_lengths": [1.0, 2.0]}),
        (ValueError, "kv_lengths must have shape [batch] = (2,), got (3,)",
         {"kv_lengths": [1, 2, 3]}),
        (ValueError, "kv_lengths must have shape", {"kv_lengths": [[1, 2]]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_bad_input_is_refused(mode, error, message, changes):
    message = re.sub(r"([()\[\]])", r"\\\1", message)
    with pytest.raises(error, match=message):
        run(lambda: sa.block_sparse_attention(**{**GOOD, **changes}), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv_lengths", [[-1, 3], [3, 25]])
def test_lengths_out_of_range_are_refused(mode, kv_lengths):
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"must be in \[0, kv_len=24\]"
    ):
        run(
            lambda x: sa.block_sparse_attention(**GOOD, kv_lengths=x),
            np.array(kv_lengths, np.int32),
            mode=mode,
        )


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("kv_indptr", lambda x: x[1:], "was the plan made for this length"),
        ("kv_indptr", lambda x: x.reshape(-1), "was the plan made for this length"),
        ("kv_indices", lambda x: x[:, :3], "kv_indices must have shape"),
        ("kv_indices", lambda x: x + 1, r"kv_indices\[0\] must be in"),
        ("mask_ids", lambda x: x[1:], "mask_ids must have shape"),
        ("mask_bits", lambda x: x[:, 1:], "mask_bits must have shape"),
    ],
)
def test_op_refuses_bad_plans(name, change, message):
    """A saved graph may hold anything; integers are 4 bytes each."""
    block_mask = pattern("local")
    tiles = block_mask.tiles()
    plan = {
        n: x if x.dtype == np.uint8 else x.view(np.uint8).reshape(-1, 4)
        for n, x in zip(tiles._fields[2:], tiles[2:])
    }
    plan[name] = change(plan[name])
    none = ("tile_blocks", "q_indptr", "q_indices", "kv_mask_ids", "kv_mask_bits")
    plan.update((n, np.zeros(0, np.uint8)) for n in none)
    attributes = {"heads": 2, "kv_heads": 2, "softmax_scale": 1.0, "row_stride": 1}
    attributes.update(block_q=tiles.tile_q, block_kv=tiles.block_size, tile_kv=0)
    attributes["rule_inputs"] = []
    op = loader.attention_ops().block_sparse_attention
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        run(
            lambda q, k, v: op(q, k, v, np.zeros(0, np.int32), **plan, **attributes),
            *random_qkv(block_mask),
        )


def test_unknown_time_and_width_are_refused():
    for attention, shape, message in (
        ("strided", [None, None, 32], "q must have a time dimension that is known"),
        ("impl", [None, None, 32], "q must have a time dimension that is known"),
        ("block", [None, 16, None], "q must have width = 4 heads"),
        ("block", None, "q must have rank 3"),
        ("impl", None, "q must have rank 3"),
    ):
        with tf.Graph().as_default(), pytest.raises(ValueError, match=message):
            q = tf.compat.v1.placeholder(tf.float32, shape)
            if attention == "strided":
                plan = sa.pattern_block_mask("strided", 16, 4, 8, 8)
                sa.block_sparse_attention(q, q, q, plan, 4)
            elif attention == "block":
                sa.block_sparse_attention(**{**GOOD, "q": q})
            else:
                sa.blocksparse_attention_impl(q, q, q, 4, "all")
