"""What two devices compute together is what one computes; for CPUs and for GPUs."""

import collections

import keras
import numpy as np
import tensorflow as tf
from helpers import assert_close
from tensorflow.python.eager import context
from tf_helpers import assert_same_bits

import sparse_attention as sa
from sparse_attention.ops.plan_tensors import kept
from sparse_attention.ops.signature import SHARED_INPUTS

TIME, VOCAB, BATCH, STEPS = 64, 50, 4, 16
PLAN_INPUTS = len(SHARED_INPUTS) - 1  # the first is kv_lengths


def check_training(devices, attention):
    """All losses, and the weights after them, are those of the first device alone.

    To the tolerance to the oracle, with one device in the oracle's place. How far
    rounding in float32 leads, the same device says on each batch backwards: the same
    sums in another order. No Adam: it makes whole steps of gradients that are nothing
    but rounding, as that of a key's bias.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)
    print("seed 0")
    tokens = np.random.RandomState(0).randint(0, VOCAB, [STEPS, BATCH, TIME + 1])
    strategy = tf.distribute.MirroredStrategy(devices)
    (together,) = trained(strategy, attention, [tokens])
    orders = [tokens, tokens[:, ::-1]]
    alone, backwards = trained(tf.distribute.get_strategy(), attention, orders)
    assert alone[0][-1] < alone[0][0] - 0.1
    for got, want, plain in zip(together, alone, backwards):
        assert_close(got, want.astype(np.float64), plain, 3)


def trained(strategy, attention, runs):
    """Yields each run's losses, and all weights after it in one array; float32.

    Args:
      runs: Tokens, int [steps, batch, time + 1]; all start from the same weights.
    """
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = sa.SparseTransformer(VOCAB, TIME, 2, 32, 4, attention, 32, 8)
        model.build([None, TIME])
        model.compile(
            keras.optimizers.SGD(0.5),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    initial = model.get_weights()
    for tokens in runs:
        model.set_weights(initial)
        batches = tf.data.Dataset.from_tensor_slices(
            (tokens[..., :-1], tokens[..., 1:])
        )
        options = dict(steps_per_epoch=1, shuffle=False, verbose=0)
        losses = model.fit(batches, epochs=STEPS, **options).history["loss"]
        weights = np.concatenate([w.numpy().ravel() for w in model.trainable_weights])
        yield np.float32(losses), weights


def check_op(devices):
    """The op and its gradients give, on both at once, the bits that one gives."""
    print("seed 0")
    halves = np.random.RandomState(0).normal(size=[2, 4, 2, 300, 128])
    halves = halves.astype(np.float32)  # q, k, v and do of each
    plans = [
        sa.pattern_block_mask(mode, 300, 2, 32, 64, 2)
        for mode in ("all", "local", "strided", "fixed")
    ]

    def results(half):
        q, k, v, do = tf.unstack(half)
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            o = [sa.block_sparse_attention(q, k, v, plan, 2) for plan in plans]
        return [*o, *tape.gradient(o, [q, k, v], len(plans) * [do])]

    strategy = tf.distribute.MirroredStrategy(devices)
    values = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(halves[context.replica_id_in_sync_group])
    )
    run = tf.function(lambda values: strategy.run(results, args=(values,)))
    ops = run.get_concrete_function(values).graph.get_operations()
    places = [op.device for op in ops if op.type.startswith("BlockSparseAttention")]
    counts = [sum(place.endswith(device) for place in places) for device in devices]
    assert counts == 2 * [2 * len(plans)]  # forward and backward
    got = zip(*map(strategy.experimental_local_results, run(values)))
    for replica, half in zip(got, halves):
        alone = results(tf.constant(half))
        assert_same_bits(*([x.numpy() for x in xs] for xs in (replica, alone)))


def check_plans(devices):
    """No plan goes from one device to another: every op reads constants beside it.

    TensorFlow's placer has the last word, so this looks at the graphs that it ran.
    """
    block_mask = sa.pattern_block_mask("local", 64, 2, 16, 32)

    def attention(x):
        return sa.block_sparse_attention(x, x, x, block_mask, 2)

    nested = tf.function(attention)

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = nested(attention(x))
            y = tf.cond(tf.reduce_sum(y) < np.inf, lambda: attention(y), lambda: y)
            _, y = tf.while_loop(
                lambda i, y: i < 2, lambda i, y: (i + 1, attention(y)), (0, y)
            )
        return tape.gradient(y, x)

    for device in devices:
        with tf.device(device):
            attention(tf.ones([1, 64, 16]))
    eager = {key[0]: plan.inputs for key, plan in kept(block_mask).items()}
    assert len(eager) == len(devices)
    assert all(x.device == device for device in eager for x in eager[device])

    strategy = tf.distribute.MirroredStrategy(devices)
    values = strategy.experimental_distribute_values_from_function(
        lambda context: tf.ones([1, 64, 16])
    )
    run = tf.function(lambda values: strategy.run(gradient, args=(values,)))
    context.enable_run_metadata()
    run(values)
    metadata = context.export_run_metadata()
    context.disable_run_metadata()
    readers = collections.Counter()
    for function in metadata.function_graphs:
        for graph in function.partition_graphs:
            nodes = {node.name: node for node in graph.node}
            for node in graph.node:
                if not node.op.startswith("BlockSparseAttention"):
                    continue
                readers[node.device] += 1
                for name in node.input[-PLAN_INPUTS:]:
                    plan = nodes[name.partition(":")[0]]
                    assert (plan.op, plan.device) == ("Const", node.device), plan.name
    # Forward and backward, each directly, in a function, in a branch and in a loop.
    counts = [readers[name] for d in devices for name in readers if name.endswith(d)]
    assert counts == [8, 8], readers
