"""What TensorFlow offers: our op, its three-op path, dense attention, gathered blocks.

Serves `cpu.py`. Inputs and results are [batch, q_len, heads * head_dim]: to split heads
and to transpose is part of a call.
"""

import functools
import inspect
import os
import sys

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import tensorflow as tf
from cpu_worker import serve

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import sparse_attention as sa

MATMUL_SIZE = 2048


# ---- ours ----


def ours(q, k, v, case, **backend):
    return sa.blocksparse_attention_impl(
        q,
        k,
        v,
        case["heads"],
        case["mode"],
        case["local_attn_ctx"],
        blocksize=case["block_size"],
        num_verts=1,
        **backend,
    )


# ---- dense ----


def dense(q, k, v, case):
    """Every score, then a mask that was made ahead."""
    mask = _mask(
        case["mode"], case["q_len"], case["local_attn_ctx"], case["block_size"]
    )
    q, k, v = (sa.split_heads(x, case["heads"]) for x in (q, k, v))
    return sa.merge_heads(tf.matmul(_softmax(_scores(q, k), mask, v.dtype), v))


@functools.lru_cache(maxsize=1)
def _mask(mode, q_len, local_attn_ctx, block_size):
    with tf.init_scope():  # not a constant of the graph
        mask = sa.get_attn_mask(q_len, mode, local_attn_ctx, 1, block_size, num_verts=1)
        return mask > 0


# ---- gathered blocks, as a user would write them for each pattern ----


def gather(q, k, v, case):
    return {"local": _local, "strided": _strided, "fixed": _fixed}[case["mode"]](
        q, k, v, case["heads"], case["local_attn_ctx"], case["block_size"]
    )


def _local(q, k, v, heads, window, block_size):
    """Windows of queries, each with its keys and those of the window before."""
    q, k, v = (_windows(x, heads, window) for x in (q, k, v))

    def with_previous(x):
        previous = tf.pad(x[:, :, :-1], [[0, 0], [0, 0], [1, 0], [0, 0], [0, 0]])
        return tf.concat([previous, x], axis=3)

    i, j = np.ogrid[:window, -window:window]
    mask = np.repeat([(i >= j) & (i - j < window)], q.shape[2], axis=0)
    mask[0] &= j >= 0
    weights = _softmax(_scores(q, with_previous(k)), mask, v.dtype)
    return _from_windows(tf.matmul(weights, with_previous(v)))


def _strided(q, k, v, heads, stride, block_size):
    """Positions of equal residue as heads of their own: causal attention in each."""
    batch, q_len, width = q.shape
    q, k, v = (
        sa.split_heads(tf.reshape(x, [batch, q_len // stride, -1]), stride * heads)
        for x in (q, k, v)
    )
    mask = np.tri(q_len // stride, dtype=bool)
    o = tf.matmul(_softmax(_scores(q, k), mask, v.dtype), v)
    return tf.reshape(sa.merge_heads(o), [batch, q_len, width])


def _fixed(q, k, v, heads, window, block_size):
    """Keys of the own window, and the summary blocks of all windows as one matrix."""
    q, k, v = (_windows(x, heads, window) for x in (q, k, v))
    batch, _, windows, _, head_dim = q.shape

    def summary(x):
        x = x[:, :, :, -block_size:]
        return tf.reshape(x, [batch, heads, 1, windows * block_size, head_dim])

    own = _scores(q, k)
    rows = tf.reshape(q, [batch, heads, 1, windows * window, head_dim])
    earlier = tf.reshape(_scores(rows, summary(k)), [batch, heads, windows, window, -1])
    earlier_mask = np.arange(windows)[:, None] > np.arange(windows).repeat(block_size)
    mask = np.concatenate(
        [
            np.broadcast_to(np.tri(window, dtype=bool), [windows, window, window]),
            np.repeat(earlier_mask[:, None], window, axis=1),
        ],
        axis=2,
    )
    weights = _softmax(tf.concat([own, earlier], axis=4), mask, v.dtype)
    own, earlier = weights[..., :window], weights[..., window:]
    earlier = tf.reshape(earlier, [batch, heads, 1, windows * window, -1])
    o = tf.reshape(tf.matmul(earlier, summary(v)), q.shape)
    return _from_windows(o + tf.matmul(own, v))


def _windows(x, heads, window):
    """[batch, q_len, heads * head_dim] -> [batch, heads, windows, window, head_dim]"""
    batch, q_len, width = x.shape
    x = tf.reshape(x, [batch, q_len // window, window, heads, width // heads])
    return tf.transpose(x, [0, 3, 1, 2, 4])


def _from_windows(x):
    batch, heads, windows, window, head_dim = x.shape
    x = tf.transpose(x, [0, 2, 3, 1, 4])
    return tf.reshape(x, [batch, windows * window, heads * head_dim])


def _scores(q, k):
    q, k = tf.cast(q, tf.float32), tf.cast(k, tf.float32)
    return tf.matmul(q, k, transpose_b=True) * q.shape[-1] ** -0.5


def _softmax(scores, mask, dtype):
    return tf.cast(tf.nn.softmax(tf.where(mask, scores, scores.dtype.min)), dtype)


# ---- the ceiling ----


def matmul(case, inputs, is_training):
    """Not attention: the product that every other time is set against."""
    a = tf.cast(tf.random.stateless_normal([MATMUL_SIZE] * 2, [0, 0]), case["dtype"])
    return _compile(lambda: [tf.matmul(a, a)])


# ---- serving ----


def contender(attention, **compile_options):
    """A `build` for `serve`."""

    def build(case, inputs, is_training):
        *qkv, do = (tf.cast(x, case["dtype"]) for x in inputs)

        def run():
            with tf.GradientTape() as tape:
                if is_training:
                    tape.watch(qkv)
                o = attention(*qkv, case)
            return [o, *(tape.gradient(o, qkv, do) if is_training else [])]

        return _compile(run, **compile_options)

    return build


def _compile(function, **options):
    graph = tf.function(function, autograph=False, **options).get_concrete_function()

    def run():
        results = graph()
        tf.test.experimental.sync_devices()
        return results

    return run, lambda x: tf.cast(x, tf.float32).numpy()


CONTENDERS = {
    "matmul": matmul,
    "fused": contender(ours),
    "dense": contender(dense),
    "dense_xla": contender(dense, jit_compile=True),
    "gather": contender(gather),
    "gather_xla": contender(gather, jit_compile=True),
}
if "backend" in inspect.signature(sa.blocksparse_attention_impl).parameters:
    CONTENDERS["three_op"] = contender(
        functools.partial(ours, backend="blocksparse_ops")
    )


if __name__ == "__main__":
    if not hasattr(getattr(tf.test, "experimental", None), "sync_devices"):
        sys.exit(f"benchmarks need TensorFlow 2.9 or later, got {tf.__version__}")
    threads = int(sys.argv[1])
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    tf.config.set_visible_devices([], "GPU")
    serve(CONTENDERS, "TensorFlow " + tf.__version__)
