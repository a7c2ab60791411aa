"""Dense and block-sparse attention side by side: the same numbers for less work.

    python examples/attention.py         in float32
    python examples/attention.py fp16    in float16

Each line of the table is one pattern of the Sparse Transformer. `attention_impl`
computes every score and masks it; `blocksparse_attention_impl` computes the blocks that
the pattern needs. Both are compared with the dense one in float64, and a wrong result
ends the program with status 1.
"""

import sys
import time

import numpy as np
import tensorflow as tf

from sparse_attention import attention_impl, blocksparse_attention_impl

PATTERNS = {
    # Every position so far: what a Transformer usually does.
    "all": {},
    # The last 32 positions, the first step of strided attention ...
    "local": {"local_attn_ctx": 32},
    # ... and every 32nd position, its second step.
    "strided": {"local_attn_ctx": 32},
    # The own window of 128 positions and, in every window before it, a summary: one
    # (vertsize) of the last four (num_verts) blocks of 32, which depends on the head.
    "fixed": {"local_attn_ctx": 128},
}


def main():
    tf.compat.v1.enable_eager_execution()  # TensorFlow 2 has it on
    dtype = tf.float16 if "fp16" in sys.argv[1:] else tf.float32

    # Queries, keys and values are [batch, time, heads * head_dim].
    random = np.random.RandomState(0)
    inputs = [tf.constant(random.normal(size=[4, 1024, 256]), dtype) for _ in "qkv"]
    inputs64 = [tf.cast(x, tf.float64) for x in inputs]
    # The first call compiles the kernels, once for all.
    blocksparse_attention_impl(*inputs, heads=4, attn_mode="all")

    print(f"TensorFlow {tf.__version__}, {dtype.name} {inputs[0].shape}, 4 heads")
    print("mode      dense ms  block-sparse ms  largest difference  tolerance")
    all_right = True
    for mode, pattern in PATTERNS.items():
        # With recompute=True a training step would keep none of the activations, and
        # compute them again in its backward pass.
        arguments = {"heads": 4, "attn_mode": mode, "recompute": True, **pattern}
        dense, dense_ms = timed(attention_impl, *inputs, **arguments)
        sparse, sparse_ms = timed(blocksparse_attention_impl, *inputs, **arguments)
        exact = attention_impl(*inputs64, **arguments).numpy()

        # It may be off by twice as much as the dense one, and two roundings.
        difference = np.abs(sparse - exact).max()
        tolerance = 2 * np.abs(dense - exact).max()
        tolerance += 2 * np.finfo(sparse.dtype).eps * np.abs(exact).max()
        all_right = all_right and difference <= tolerance  # a NaN is not
        print(
            f"{mode:<8}{dense_ms:>10.1f}{sparse_ms:>17.1f}{difference:>20.1e}"
            f"{tolerance:>11.1e}"
        )
    print("all right" if all_right else "WRONG: a difference is above its tolerance")
    return 0 if all_right else 1


def timed(attention, *args, **kwargs):
    """The result as an array, and the milliseconds of the fastest of a few calls."""
    times = []
    while len(times) < 6 and sum(times) < 1:  # the first one makes the plan, too
        start = time.perf_counter()
        result = attention(*args, **kwargs).numpy()
        times.append(time.perf_counter() - start)
    return result, 1000 * min(times)


if __name__ == "__main__":
    sys.exit(main())
