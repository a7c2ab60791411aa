"""What each rule between q kT and the softmax adds to the time of attention without one.

    python benchmarks/rules.py             # on the CPU, a few minutes

`all`, batch 1, 4 heads of 64; forward, and forward with gradients, through
`block_sparse_attention` in a `tf.function`. The contenders are timed in turn, round after
round, and a median stands for each, so that a busy machine disturbs all of them alike.
"""

import argparse
import statistics
import time

import numpy as np
import tensorflow as tf

import sparse_attention as sa

HEADS, HEAD_DIM = 4, 64


def documents(time_steps, count):
    """int32 [1, time_steps]: `count` documents of the same length."""
    return np.arange(time_steps, dtype=np.int32)[None] * count // time_steps


def rules(time_steps):
    random = np.random.RandomState(0)
    padding = np.arange(time_steps) >= time_steps // 4
    bias = random.randn(HEADS, 2 * 128 - 1).astype(np.float32)
    return {
        "none": {},
        "logit_softcap": {"logit_softcap": 30.0},
        "alibi_slopes": {"alibi_slopes": 0.5 ** np.arange(1.0, HEADS + 1)},
        "relative_bias": {"relative_bias": bias},
        "sinks": {"sinks": np.zeros(HEADS, np.float32)},
        "dropout": {"dropout_rate": 0.1, "dropout_seed": [1, 2]},
        "mask [1, 1, 1, kv_len], a quarter padding": {
            "mask": padding[None, None, None]
        },
        "mask [1, 1, q_len, kv_len]": {
            "mask": np.ones([1, 1, time_steps, time_steps], bool)
        },
        "one document": {"segment_ids": documents(time_steps, 1)},
        "4 documents": {"segment_ids": documents(time_steps, 4)},
        "16 documents": {"segment_ids": documents(time_steps, 16)},
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time", type=int, default=4096, help="sequence length")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    plan = sa.pattern_block_mask("all", args.time, HEADS, 32)
    shape = [1, args.time, HEADS * HEAD_DIM]
    q, k, v, do = (
        tf.cast(tf.random.stateless_normal(shape, [i, 0]), args.dtype) for i in range(4)
    )
    contenders = {}
    for name, rule in rules(args.time).items():
        rule = {
            key: x if isinstance(x, float) else tf.constant(x)
            for key, x in rule.items()
        }

        def forward(q, k, v, rule=rule):
            return sa.block_sparse_attention(q, k, v, plan, HEADS, **rule)

        def both(q, k, v, rule=rule):
            trained = [rule[n] for n in ("relative_bias", "sinks") if n in rule]
            with tf.GradientTape() as tape:
                tape.watch([q, k, v, *trained])
                o = forward(q, k, v, rule)
            return tape.gradient(o, [q, k, v, *trained], do)

        contenders[name] = tf.function(forward), tf.function(both)
    seconds = {name: ([], []) for name in contenders}
    for turn in range(args.rounds + 1):
        for name, functions in contenders.items():
            for function, times in zip(functions, seconds[name]):
                start = time.perf_counter()
                tf.nest.map_structure(lambda x: x.numpy(), function(q, k, v))
                if turn:  # the first round traces
                    times.append(time.perf_counter() - start)
    medians = {
        name: [statistics.median(t) for t in both] for name, both in seconds.items()
    }
    print(
        f"TensorFlow {tf.__version__}, T {args.time}, {args.dtype}: ms, and times none"
    )
    print(f"{'rule':44}{'forward':>16}{'with gradients':>20}")
    for name, (forward, both) in medians.items():
        ratios = forward / medians["none"][0], both / medians["none"][1]
        print(
            f"{name:44}{1e3 * forward:8.1f}{ratios[0]:8.2f}{1e3 * both:12.1f}{ratios[1]:8.2f}"
        )


if __name__ == "__main__":
    main()
