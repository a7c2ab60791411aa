"""The op in TensorFlow on one GPU, beside TensorFlow's dense attention. Started by `gpu.py`.

A `tf.function` holds CALLS calls of attention on as many sets of tensors, one after the
other as the layers of a model are: no set is in L2 when its turn comes. FUNCTIONS of them
are dispatched without a wait, as the steps of a training loop are, and timed as a group by
the clock, from the first dispatch to the arrival of the last result. Milliseconds are of
one call: median, 10th and 90th percentile of groups for half a second, at least three; a
group has fewer functions where it would take longer than a third of that.

Dense attention is `attention_impl`: every score in memory, bfloat16, softmax in float32.
Plain, a function holds one call, which alone takes gigabytes; under XLA each call is one
compiled cluster. MB: the peak of TensorFlow's allocator during one call, less inputs and
results. The longest sequences under `all` come last.
"""

import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import gpu  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import sparse_attention as sa  # noqa: E402

CALLS, FUNCTIONS = 16, 8
SECONDS = 0.5
DENSE_LENGTH = 4096  # the longest that dense attention fits into 80 GB with


def fused(case):
    return lambda q, k, v: sa.blocksparse_attention_impl(
        *(q, k, v, case.heads, case.mode, case.local_attn_ctx),
        blocksize=case.block_size,
        num_verts=1,
        vertsize=1,
    )


def dense(case):
    return lambda q, k, v: sa.attention_impl(
        q, k, v, case.heads, case.mode, case.local_attn_ctx
    )


def trained(attention):
    """Attention and its gradients, for a gradient of o that is q."""

    def run(q, k, v):
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            o = attention(q, k, v)
        return [o, *tape.gradient(o, [q, k, v], q)]

    return run


def in_turn(run):
    """A function that runs on one set of tensors after the other."""

    @tf.function
    def all_sets(sets):
        results = []
        for tensors in sets:
            with tf.control_dependencies(results[-1] if results else []):
                tensors = [tf.identity(x) for x in tensors]
            results.append(tf.nest.flatten(run(*tensors)))
        return results

    return all_sets


def wait(results):
    return results[-1][-1][0, 0, 0].numpy()


def measure(case, contender, attention, calls=CALLS, jit_compile=None):
    run, shape = attention, [case.batch, case.q_len, case.heads * case.head_dim]
    for phase in ("fwd", "fwd+bwd"):
        sets = [
            [tf.cast(tf.random.normal(shape), tf.bfloat16) for _ in range(3)]
            for _ in range(calls)
        ]
        in_sets = in_turn(tf.function(run, jit_compile=jit_compile))
        row = dict(case._asdict(), phase=phase, contender=contender)
        try:
            wait(in_sets(sets[:1]))  # compiles what is compiled
            row["MB"] = peak_mb(in_sets, sets[:1])
            row.update(timed(in_sets, sets))
        except tf.errors.ResourceExhaustedError:
            row["error"] = "out of memory"
        gpu.emit(row)
        run = trained(attention)


def timed(run, sets):
    wait(run(sets))
    functions = min(FUNCTIONS, 1 + int(SECONDS / 3 / seconds(run, sets, 1)))
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        group = seconds(run, sets, functions)
        times.append(1e3 * group / functions / len(sets))
    return dict(zip(("ms", "ms_low", "ms_high"), np.percentile(times, [50, 10, 90])))


def seconds(run, sets, functions):
    start = time.perf_counter()
    for _ in range(functions):
        results = run(sets)  # those before go: the stream is done with them in time
    wait(results)
    return time.perf_counter() - start


def peak_mb(run, sets):
    tf.config.experimental.reset_memory_stats("GPU:0")
    before = tf.config.experimental.get_memory_info("GPU:0")["current"]
    results = run(sets)
    wait(results)
    peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    sizes = [2 * int(tf.size(x)) for x in tf.nest.flatten(results)]
    return (peak - before - sum(sizes)) / 1e6


def ceiling():
    a = tf.cast(tf.random.normal([8192, 8192]), tf.bfloat16)
    run = in_turn(lambda a: [tf.matmul(a, a)[None]])
    return {"matmul_tflops": 2 * 8192**3 / timed(run, [[a]] * CALLS)["ms"] / 1e9}


def main():
    args = gpu.parse_args()
    device = tf.config.list_physical_devices("GPU")[0]
    tf.config.experimental.set_memory_growth(device, True)
    name = tf.config.experimental.get_device_details(device)["device_name"]
    gpu.emit({"framework": f"TensorFlow {tf.__version__}", "gpu": name, **ceiling()})
    cases = sum(gpu.cases("tensorflow", args.modes, args.lengths), [])
    cases.sort(key=lambda case: case.mode == "all" and case.q_len > 16384)
    for case in cases:
        measure(case, "ours, in TensorFlow", fused(case))
        if case.mode == "all" and case.q_len <= DENSE_LENGTH:
            measure(case, "TF dense", dense(case), calls=1)
            measure(case, "TF dense, XLA", dense(case), jit_compile=True)


if __name__ == "__main__":
    main()
