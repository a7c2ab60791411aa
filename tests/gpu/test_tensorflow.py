"""The TensorFlow ops on a GPU, against the float64 oracle.

SPARSE_ATTENTION_REQUIRE=gpu python -m pytest tests/gpu/test_tensorflow.py
"""

import numpy as np
import pytest
from tf_helpers import MODES, assert_same_bits, check_attention, run_with_gradients

tf = pytest.importorskip("tensorflow")
sa = pytest.importorskip("sparse_attention")

from sparse_attention.block_mask import pattern_block_mask  # noqa: E402

pytestmark = pytest.mark.gpu


def on(device, block_mask, heads=2, **options):
    def attention(q, k, v):
        with tf.device(device):
            return sa.block_sparse_attention(
                q, k, v, block_mask, heads, return_lse=True, **options
            )

    return attention


def patterns():
    for mode in ("all", "local", "strided", "fixed"):
        context = None if mode == "all" else 7 if mode == "strided" else 64
        verts = 2 if mode == "fixed" else None
        yield pattern_block_mask(mode, 300, 2, 32, context, verts)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_attention_matches_oracle(mode, dtype):
    for block_mask in patterns():
        attention = on("/gpu:0", block_mask)
        check_attention(attention, block_mask, mode, True, head_dim=64, dtype=dtype)


def test_every_option_matches_oracle():
    block_mask = next(patterns())
    lengths = {"kv_lengths": [200, 0], "softmax_scale": -0.3}
    check_attention(
        on("/gpu:0", block_mask, heads=4, kv_heads=2, **lengths),
        block_mask,
        "function",
        **dict(heads=4, kv_heads=2, head_dim=64, head_dim_v=128, **lengths),
    )


def test_two_runs_are_bitwise_equal():
    for block_mask in patterns():
        q, do = np.random.RandomState(0).normal(size=[2, 2, 300, 128])
        inputs = [q.astype(np.float16)] * 3
        d_outputs = [do.astype(np.float16), np.ones([2, 2, 300], np.float32)]
        first, second = (
            run_with_gradients(on("/gpu:0", block_mask), inputs, d_outputs)
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


def test_mirrored_strategy_gives_the_loss_of_one_gpu():
    if len(tf.config.list_physical_devices("GPU")) < 2:
        pytest.skip("needs two GPUs")
    block_mask = next(patterns())
    x = np.random.RandomState(0).normal(size=[4, 300, 128]).astype(np.float32)

    def loss(x):
        o = sa.block_sparse_attention(x, x, x, block_mask, 2)
        return tf.reduce_sum(o * o)

    strategy = tf.distribute.MirroredStrategy(["/gpu:0", "/gpu:1"])

    def replica(context):
        return x[2 * context.replica_id_in_sync_group :][:2]

    values = strategy.experimental_distribute_values_from_function(replica)
    run = tf.function(lambda values: strategy.run(loss, args=(values,)))
    losses = strategy.experimental_local_results(run(values))
    want = [loss(tf.constant(part)).numpy() for part in (x[:2], x[2:])]
    np.testing.assert_array_equal([value.numpy() for value in losses], want)
