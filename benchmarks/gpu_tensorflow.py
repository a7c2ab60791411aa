"""Attention through TensorFlow on a GPU, beside dense attention compiled by XLA.

    python benchmarks/gpu_tensorflow.py

Times are means over calls of a `tf.function` that Python dispatches one after another, so
half a millisecond a call is the least that can be seen; `gpu_kernels.py` times the kernels.
"""

import time

import tensorflow as tf

import sparse_attention as sa

CALLS = 20


def milliseconds(run, inputs):
    def wait(outputs):
        return tf.reduce_sum(outputs[0][0, 0]).numpy()

    run(*inputs)  # traces and compiles
    wait(run(*inputs))
    start = time.perf_counter()
    for _ in range(CALLS):
        outputs = run(*inputs)
    wait(outputs)
    return 1e3 * (time.perf_counter() - start) / CALLS


def measure(name, attention, inputs, jit_compile=None):
    def forward(*inputs):
        return (attention(*inputs),)

    def train(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            o = attention(*inputs)
        return tape.gradient(o, inputs)

    times = [
        milliseconds(tf.function(run, jit_compile=jit_compile), inputs)
        for run in (forward, train)
    ]
    print("{} fwd {:.3f} fwd+bwd {:.3f} ms".format(name, *times), flush=True)


def ours(mode, heads, window):
    return lambda q, k, v: sa.blocksparse_attention_impl(
        q, k, v, heads, mode, window, blocksize=32, num_verts=1, vertsize=1
    )


def inputs(batch, q_len, width):
    shape = [batch, q_len, width]
    return [tf.cast(tf.random.normal(shape), tf.bfloat16) for _ in range(3)]


def main():
    qkv = inputs(4, 4096, 16 * 64)
    for mode in ("all", "local", "strided", "fixed"):
        measure(f"T4096 B4 16x64 bf16 {mode}", ours(mode, 16, 128), qkv)
    measure("dense all XLA", lambda *x: sa.attention_impl(*x, 16, "all"), qkv, True)
    qkv = inputs(1, 65536, 8 * 64)
    for mode in ("fixed", "strided", "local"):
        measure(f"T65536 B1 8x64 bf16 {mode}", ours(mode, 8, 256), qkv)


if __name__ == "__main__":
    main()
