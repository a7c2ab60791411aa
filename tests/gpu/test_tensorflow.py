"""The TensorFlow ops on a GPU, against the float64 oracle.

SPARSE_ATTENTION_REQUIRE=gpu python -m pytest tests/gpu/test_tensorflow.py
"""

import blocks_oracle as oracle
import blocks_runner
import numpy as np
import pytest
import tensorflow as tf
import test_longer_plans
import test_score_rules
from blocks_oracle import f32, random_layout, random_mask
from helpers import DTYPES, PATTERNS, assert_close
from tf_helpers import (
    MODES,
    assert_same_bits,
    attention_on,
    check_attention,
    run_with_gradients,
)

import sparse_attention as sa
from sparse_attention.plan import reference
from sparse_attention.plan.patterns import pattern_block_mask

pytestmark = pytest.mark.gpu
ALLOW_TF32 = tf.config.experimental.enable_tensor_float_32_execution


@pytest.fixture(autouse=True)
def exact_float32():
    ALLOW_TF32(False)
    yield
    ALLOW_TF32(True)  # as TensorFlow begins


def patterns():
    for mode in PATTERNS:
        context = None if mode == "all" else 7 if mode == "strided" else 64
        verts = 2 if mode == "fixed" else None
        yield pattern_block_mask(mode, 300, 2, 32, context, verts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_attention_matches_oracle(mode, dtype):
    for block_mask in patterns():
        attention = attention_on(block_mask, 2, "/gpu:0")
        check_attention(attention, block_mask, mode, True, head_dim=64, dtype=dtype)


def test_float32_follows_tensorflow_into_tf32():
    ran = []
    for block_mask in patterns():
        attention = attention_on(block_mask, 2, "/gpu:0")
        x = np.random.RandomState(0).normal(size=[2, 300, 128]).astype(np.float32)
        results = []
        for allowed in (False, True):
            ALLOW_TF32(allowed)
            check_attention(attention, block_mask, "eager", head_dim=64, tf32=allowed)
            results.append(attention(x, x, x)[0].numpy())
        ran.append(np.abs(results[0] - results[1]).max())
    assert min(ran) > 2.0**-16  # the two are not the same kernel


def test_every_option_matches_oracle():
    block_mask = next(patterns())
    lengths = {"kv_lengths": [200, 0], "softmax_scale": -0.3}
    check_attention(
        attention_on(block_mask, 4, "/gpu:0", kv_heads=2, **lengths),
        block_mask,
        "function",
        **dict(heads=4, kv_heads=2, head_dim=64, head_dim_v=128, **lengths),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", test_score_rules.ALL)
def test_each_rule_matches_oracle(name, dtype):
    with tf.device("/gpu:0"):
        test_score_rules.check(test_score_rules.ALL[name], dtype=dtype)
        test_score_rules.check(test_score_rules.ALL[name], "strided", kv_heads=2)


def test_all_rules_together_match_oracle():
    rules = test_score_rules.ALL.values()
    with tf.device("/gpu:0"):
        test_score_rules.check({k: v for rule in rules for k, v in rule.items()}, "all")


@pytest.mark.parametrize("length", [21, 64])
def test_a_longer_plan_is_that_of_the_length(length):
    for attn_mode in ("all", "local", "fixed"):
        with tf.device("/gpu:0"):
            test_longer_plans.check(attn_mode, length)


def test_two_runs_are_bitwise_equal():
    for block_mask in patterns():
        q, do = np.random.RandomState(0).normal(size=[2, 2, 300, 128])
        inputs = [q.astype(np.float16)] * 3
        d_outputs = [do.astype(np.float16), np.ones([2, 2, 300], np.float32)]
        first, second = (
            run_with_gradients(attention_on(block_mask, 2, "/gpu:0"), inputs, d_outputs)
            for _ in range(2)
        )
        assert_same_bits(first, second)


def test_plan_lies_in_device_memory():
    """No kernel waits for a copy: nothing but q, k and v is on the host."""
    block_mask = next(patterns())
    with tf.Graph().as_default() as graph, tf.device("/gpu:0"):
        x = tf.zeros([2, 300, 128])
        sa.block_sparse_attention(x, x, x, block_mask, 2)
    types = {
        op.outputs[0].dtype
        for op in graph.get_operations()
        if op.type == "Const" and op.name.startswith("block_mask")
    }
    assert types == {tf.uint8}


def test_out_of_memory_is_resource_exhausted():
    """x doubles until it fits, but o beside it does not."""
    block_mask = pattern_block_mask("local", 1 << 16, 1, 32, 64)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        batch = tf.compat.v1.placeholder(tf.int32, [])
        with tf.device("/gpu:0"):
            x = tf.ensure_shape(
                tf.zeros([batch, 1 << 16, 256], "half"), [None, 1 << 16, 256]
            )
            o = sa.block_sparse_attention(x, x, x, block_mask, 1)
            first = o[0, 0, 0]
        with pytest.raises(
            tf.errors.ResourceExhaustedError, match="BlockSparseAttention"
        ):
            for n in range(6, 16):
                session.run(first, {batch: 2**n})
        session.run(first, {batch: 1})  # and goes on


# ---- the three-op family ----


def three_op_patterns():
    for size in (8, 16, 32, 64):
        for mode in ("all", "local", "fixed"):
            context = None if mode == "all" else 4 * size
            yield sa.get_blocksparse_obj(8 * size, 4, mode, size, context)


@pytest.mark.parametrize(
    "dtype, weights",
    [("float32", "bfloat16"), ("float16", "float16"), ("bfloat16", "bfloat16")],
)
@pytest.mark.parametrize("mode", MODES)
def test_three_ops_match_oracle(mode, dtype, weights):
    for bst in three_op_patterns():
        for key in (None, bst.blk_size + 3):
            dtypes = blocks_runner.check_attention(
                bst, mode, dtype, key=key, device="/gpu:0"
            )
            assert dtypes == ("bfloat16", weights)


def test_three_ops_in_float32_match_oracle():
    for bst in three_op_patterns():
        float32 = dict(scores=tf.float32, weights=tf.float32, device="/gpu:0")
        blocks_runner.check_attention(bst, "function", "float32", **float32)


def test_three_ops_run_on_the_gpu():
    bst = sa.BlocksparseTransformer(random_layout(2), 32, 2, random_mask)
    with tf.device("/gpu:0"):
        q, k = (tf.ones([2, n * 32, 2 * 64], tf.float16) for n in (3, 4))
    with tf.GradientTape() as tape:
        tape.watch([q, k])
        w = bst.query_key_op(q, k)
        a = bst.masked_softmax(w, 0.5, autoregress_at_key=7)
        y = bst.weight_value_op(a, k)
    results = [w, a, bst.softmax(w), y, bst.tn_op(a, q), *tape.gradient(y, [q, k])]
    assert all("GPU:0" in x.device for x in results)


def test_three_ops_are_bitwise_the_same_twice():
    bst = sa.BlocksparseTransformer(random_layout(2), 32, 2, random_mask)
    random = np.random.RandomState(0)
    q, k = (random.normal(size=[2, n * 32, 128]).astype(np.float16) for n in (3, 4))
    first, second = (
        blocks_runner.evaluate(
            "function", blocks_runner.attend(bst), [q, k, k], q, "/gpu:0"
        )
        for _ in range(2)
    )
    assert_same_bits(first, second)


def test_heads_with_different_block_counts_give_zeros():
    bst = sa.BlocksparseTransformer(random_layout(3), 16, 3, random_mask)
    counts = [len(blocks) for blocks in bst.nt_list]
    assert min(counts) < bst.blocks
    q, k = (np.ones([2, n * 16, 3 * 16], np.float32) for n in (3, 4))
    w, a, y, *_ = blocks_runner.evaluate(
        "eager", blocks_runner.attend(bst), [q, k, k], q, "/gpu:0"
    )
    for head, count in enumerate(counts):
        for blocks in (w, a):
            assert not f32(blocks)[:, head, count:].any()
            assert f32(blocks)[:, head, :count].any()
    assert not y[:, 16:32].any() and y[:, :16].all()  # queries without keys


# ---- both devices ----


def test_cpu_and_gpu_agree():
    """To the tolerance to the oracle, with the CPU in the oracle's place."""
    for block_mask in patterns():
        random = np.random.RandomState(0)
        q, k, v, do = random.normal(size=[4, 2, 300, 2, 64]).astype(np.float32)
        dlse = np.zeros([2, 2, 300], np.float32)
        cpu, gpu = (
            run_with_gradients(
                attention_on(block_mask, 2, device),
                [x.reshape(2, 300, 128) for x in (q, k, v)],
                [do.reshape(2, 300, 128), dlse],
            )
            for device in ("/cpu:0", "/gpu:0")
        )
        mask = block_mask.to_dense()
        exact = [
            *reference.attention_fwd(q, k, v, mask),
            *reference.attention_bwd(q, k, v, mask, do),
        ]
        for i, (c, g, e) in enumerate(zip(sum(cpu, []), sum(gpu, []), exact)):
            assert_close(g, c.astype(np.float64), e.reshape(g.shape), 2 if i < 2 else 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
def test_cpu_and_gpu_agree_on_the_three_ops(block_size, dtype):
    bst = sa.BlocksparseTransformer(random_layout(3), block_size, 3, random_mask)
    q, k = (oracle.rows(bst, side, 40, dtype, 1) for side in ("q", "kv"))
    w = oracle.blocks_of(bst, "bfloat16", 2)

    def ops(q, k, w):
        a = bst.masked_softmax(w, 0.5, dtype=tf.as_dtype(dtype))
        return [bst.nt_op(q, k), bst.nn_op(w, k), bst.tn_op(w, q), a]

    cpu, gpu = (
        blocks_runner.evaluate("function", ops, [q, k, w], device=device)
        for device in ("/cpu:0", "/gpu:0")
    )
    exact = [
        *(oracle.nt(bst, q, k), oracle.nn(bst, w, k), oracle.tn(bst, w, q)),
        oracle.softmax(bst, w, 0.5),
    ]
    for c, g, e in zip(cpu, gpu, exact):
        assert_close(g, c.astype(np.float64), e, 2)
