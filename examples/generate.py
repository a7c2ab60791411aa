"""Continues a text by a model that train_lm.py has trained.

    python examples/generate.py train_lm/fixed
    python examples/generate.py train_lm/fixed --prompt "class Tree:" --temperature 0.7

Prints bytes as they come, then what one cost: its time, and how many bytes of keys and
values it read, beside what dense attention would have read.
"""

import argparse
import codecs
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import numpy as np  # noqa: E402
from runs import load_model  # noqa: E402

import sparse_attention as sa  # noqa: E402


def main(argv=None):
    parser = argument_parser()
    args = parser.parse_args(argv)
    prompt = np.frombuffer(args.prompt.encode(), np.uint8)[None]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    waiting = [args.prompt]  # for the first byte: the arguments may not fit

    def show(tokens):
        text = decoder.decode(tokens.astype(np.uint8).tobytes())
        print(*waiting, text, sep="", end="", flush=True)
        waiting.clear()

    try:
        model = load_model(args.folder)
        _, statistics = sa.generate(
            model,
            prompt,
            args.length,
            args.temperature,
            args.top_k,
            args.seed,
            on_token=show,
            top_p=args.top_p,
        )
    except ValueError as error:
        parser.error(str(error))
    print(
        f"\n\n{1000 * statistics.seconds_per_token:.2f} ms a byte of text; read "
        f"{statistics.bytes_per_token / 1e6:.3f} MB of keys and values for it, dense "
        f"attention {statistics.dense_bytes_per_token / 1e6:.3f} MB"
    )
    return 0


def argument_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="of one pattern, in train_lm's output"
    )
    parser.add_argument("--prompt", default="import ", help="the text to continue")
    parser.add_argument("--length", type=int, default=500, help="in bytes")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0: the likeliest"
    )
    parser.add_argument("--top-k", type=int, help="draw from so many bytes only")
    parser.add_argument(
        "--top-p", type=float, help="draw from the likeliest bytes of this probability"
    )
    parser.add_argument("--seed", type=int, help="the same seed, the same text")
    return parser


if __name__ == "__main__":
    sys.exit(main())
