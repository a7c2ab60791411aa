"""What a generated token costs, by pattern: time, and bytes of keys and values.

    python benchmarks/generation.py               # a minute or two
    python benchmarks/generation.py --time 16384

The model is not trained; a step costs the same. Its prompt ends close to the end of its
time, where dense attention reads the most.
"""

import argparse

import numpy as np

import sparse_attention as sa
from sparse_attention.plan.patterns import PAPERS_MODELS, PATTERNS


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=100)
    options = parser.parse_args(arguments)
    random = np.random.RandomState(0)
    prompt = random.randint(0, 256, [options.batch, options.time - options.length])
    print("attention      ms/token    MB read/token")
    for attention in [*PATTERNS, PAPERS_MODELS["strided"]]:
        model = sa.SparseTransformer(
            vocab_size=256,
            time=options.time,
            layers=options.layers,
            width=options.width,
            heads=options.heads,
            attention=attention,
            local_attn_ctx=128,
        )
        _, statistics = sa.generate(model, prompt, options.length)
        milliseconds = 1000 * statistics.seconds_per_token
        megabytes = statistics.bytes_per_token / 1e6
        print(f"{attention:<15}{milliseconds:>8.1f}{megabytes:>17.2f}")


if __name__ == "__main__":
    main()
