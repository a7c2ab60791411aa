"""What a call costs before the kernel runs: microseconds of a small one.

The case is `local`, batch 1, 8 heads of 64, so small that the kernel is over before the
next call is there: T 512 and bfloat16 on a GPU, T 64 and float32 on a CPU. "in a
function" is the time that one more of 16 calls in a row adds to a `tf.function`.

    python benchmarks/launch_cost.py
"""

import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import tensorflow as tf  # noqa: E402

import sparse_attention as sa  # noqa: E402

HEADS, HEAD_DIM, CALLS, ROUNDS = 8, 64, 200, 15


def microseconds(call, calls):
    """The median, over rounds, of one of so many calls; each round waits for the last."""
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            o = call()
        o.numpy()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(found)


def main():
    has_gpu = bool(tf.config.list_physical_devices("GPU"))
    length, dtype = (512, "bfloat16") if has_gpu else (64, "float32")
    plan = sa.pattern_block_mask("local", length, HEADS, 32, local_attn_ctx=32)
    x = tf.cast(tf.random.normal([1, length, HEADS * HEAD_DIM]), dtype)

    def attention(q):
        return sa.block_sparse_attention(q, x, x, plan, HEADS)

    @tf.function
    def in_a_row(q, count):
        for _ in range(count):
            q = attention(q)
        return q

    def one():
        return in_a_row(x, 1)

    def many():
        return in_a_row(x, 16)

    for warm_up in (lambda: attention(x), one, many):
        warm_up().numpy()
    device = "GPU" if has_gpu else "CPU"
    print(f"{device}, T {length}, {dtype}, local, batch 1, {HEADS} heads of {HEAD_DIM}")
    print(f"eager: {microseconds(lambda: attention(x), CALLS):.0f} us")
    alone, row = microseconds(one, CALLS), microseconds(many, CALLS // 4)
    print(
        f"in a function: {(row - alone) / 15:.1f} us; a function of one: {alone:.0f} us"
    )


if __name__ == "__main__":
    main()
