"""Whether a model uses a long context: bits per byte by the number of bytes before it.

    python examples/loss_by_position.py train_lm/dense train_lm/fixed --output positions.json

The folders are those of runs of train_lm.py, which all learned the same data (`--data` as
there). The test data are cut into sequences of the model's time, and a byte at position n of
one is told from the n bytes before it. What is printed and kept is the mean over all
sequences of each range of positions, whose bounds double.
"""

import argparse
import json
import os
import sys
import zlib
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from runs import load_model, read_config  # noqa: E402
from text import read_data, sequences, split  # noqa: E402

FIRST_BOUND = 64


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--data", type=Path, help="a file; else the standard library")
    parser.add_argument("--output", type=Path, help="file for the numbers as JSON")
    args = parser.parse_args(argv)
    found = {}
    try:
        data = read_data(args.data)
        for folder in args.folders:
            check_data(folder, data)
            found[str(folder)] = in_ranges(bits_by_position(load_model(folder), data))
            print(f"{folder}: {in_words(found[str(folder)])}", flush=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def check_data(folder, data):
    """Raises where the run did not learn these data, whose test part it may then know."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} must hold a run of train_lm.py, has no {path.name}")
    if read_config(folder)["training"]["data_crc32"] != zlib.crc32(data):
        raise ValueError(f"{folder} holds a run of other data; give its --data")


def bits_by_position(model, data):
    """float64 [time]: the mean over the sequences of the test data."""

    @tf.function(jit_compile=model.supports_jit)
    def bits_of(tokens, following):
        logits = tf.cast(model(tokens), tf.float32)
        nats = tf.nn.sparse_softmax_cross_entropy_with_logits(following, logits)
        return nats[0] / np.log(2)

    test = np.frombuffer(split(data)[2], np.uint8)
    starts = np.arange(0, len(test) - model.time, model.time)
    bits = [
        bits_of(*sequences(test, starts[i : i + 1], model.time))
        for i in range(len(starts))
    ]
    return np.mean([np.asarray(x, np.float64) for x in bits], axis=0)


def in_ranges(bits):
    """[{"from", "to", "bits_per_byte"}]: of the positions from one bound up to the next."""
    bounds = [0, FIRST_BOUND]
    while bounds[-1] < len(bits):
        bounds.append(min(2 * bounds[-1], len(bits)))
    return [
        {"from": a, "to": b, "bits_per_byte": round(float(bits[a:b].mean()), 4)}
        for a, b in zip(bounds, bounds[1:])
        if a < len(bits)
    ]


def in_words(rows):
    return ", ".join(f"{r['bits_per_byte']:.3f} to {r['to']:,}" for r in rows)


if __name__ == "__main__":
    sys.exit(main())
