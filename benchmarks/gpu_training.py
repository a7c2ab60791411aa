"""What it costs to train the Sparse Transformer on a GPU: time, memory and length.

    python benchmarks/gpu_training.py --out FOLDER     on a GPU
    python benchmarks/gpu_training.py --small          the same in small, on anything
    ... --parts speed --attention fixed                one point by itself

The model is the paper's for enwik8: 12,288 positions, width 512, 8 heads, l = 128, blocks
of 32, in mixed_bfloat16, recomputed block by block as in the paper. A step is what Keras
`fit` runs: forward, backward and Adam, compiled by XLA unless `--uncompiled` is given.
"TensorFlow dense" is the same model with `attention_impl`, which computes every score, in
place of our op.

    speed    seconds a step of 30 layers, as the paper has; median, waiting for each step
    memory   the peak at some lengths, batch 1, 12 layers: weights, Adam, activations
    length   the largest of LENGTHS at which 30 layers train, batch 1, recomputed and not
    million  steps of 30 layers of `strided` at 1,048,576 positions, in blocks of 64

Lines are printed as they come, and gpu_training.json is written anew with each. Once
--seconds are over nothing more is begun; what is left out is listed.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import time
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import turns  # noqa: E402

import sparse_attention as sa  # noqa: E402
from sparse_attention.plan.patterns import PAPERS_MODELS  # noqa: E402

ATTENTION = {
    "dense": PAPERS_MODELS["dense"],
    "fixed": "fixed",
    "strided": PAPERS_MODELS["strided"],
    "TensorFlow dense": PAPERS_MODELS["dense"],
}
PAPER = {"dense": 1.31, "fixed": 0.55, "strided": 0.35}  # s/step on V100s
LENGTHS = [16384, 24576, 32768, 49152, 65536, 98304, 131072, 196608, 262144]

FULL = {
    "model": {"width": 512, "heads": 8, "local_attn_ctx": 128, "block_size": 32},
    "speed": {"length": 12288, "batch": 4, "layers": 30, "steps": 10},
    "memory": {"lengths": [65536, 16384, 4096], "layers": 12},
    "length": {
        "layers": 30,
        "lengths": LENGTHS,
        "first": {False: 131072, True: 262144},  # where the search begins
    },
    # A plan is made from every pair of blocks: with blocks of 32 from 2^30 of them.
    "million": {"length": 1048576, "layers": 30, "steps": 3, "block_size": 64},
}
SMALL = {
    "model": {"width": 32, "heads": 4, "local_attn_ctx": 32, "block_size": 8},
    "speed": {"length": 128, "batch": 2, "layers": 2, "steps": 2},
    "memory": {"lengths": [128, 64], "layers": 1},
    "length": {
        **{"layers": 1, "lengths": [64, 96, 128]},
        "first": {False: 96, True: 128},
    },
    "million": {"length": 256, "layers": 1, "steps": 1, "block_size": 16},
}


class Benchmark:
    """The rows so far, and the clock."""

    def __init__(self, options):
        self.out, self.sizes = options.out, SMALL if options.small else FULL
        self.contenders = options.attention
        self.end = time.monotonic() + options.seconds
        self.rows, self.variables = [], []
        gpus = tf.config.list_physical_devices("GPU")
        details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
        self.head = {
            "device": details[0]["device_name"] if gpus else None,
            "compiled_by_xla": not options.uncompiled,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "paper_seconds_a_step": PAPER,
        }
        print(self.head, flush=True)

    # ---- parts ----

    def speed(self):
        for contender in self.contenders:
            point = dict(self.sizes["speed"])
            if contender == "TensorFlow dense":
                point["batch"] = 1  # its scores take gigabytes each
            self.measure("speed", contender, **point)

    def memory(self):
        sizes = self.sizes["memory"]
        for length in sizes["lengths"]:
            for contender in self.contenders:
                if contender == "TensorFlow dense" and length > 4096:
                    continue  # its product fails at 2^31 scores, 8 heads of 16,384, for good
                self.measure("memory", contender, length, sizes["layers"])

    def length(self):
        for contender in [c for c in ("strided", "fixed") if c in self.contenders]:
            for recompute in (False, True):
                longest = self.longest(contender, recompute)
                print(f"longest: {contender}, recompute {recompute}: {longest}")

    def longest(self, contender, recompute):
        """The largest of the lengths that trains, or None."""
        sizes = self.sizes["length"]
        lengths, first = sizes["lengths"], sizes["first"][recompute]

        def trains(length):
            point = "length", contender, length, sizes["layers"]
            row = self.measure(*point, recompute=recompute)
            return row is not None and "error" not in row

        shorter = [length for length in lengths if length <= first]
        longest = next(filter(trains, reversed(shorter)), None)
        if longest == shorter[-1]:
            for length in lengths[len(shorter) :]:
                if not trains(length):
                    break
                longest = length
        return longest

    def million(self):
        self.measure("million", "strided", **self.sizes["million"])

    # ---- one point ----

    def measure(
        self,
        part,
        contender,
        length,
        layers,
        batch=1,
        steps=1,
        recompute=True,
        block_size=None,
    ):
        """The row of a point, which goes on after an error; None: the time is over."""
        row = {
            "part": part,
            "attention": contender,
            "length": length,
            "batch": batch,
            "layers": layers,
            "recompute": recompute,
            "block_size": block_size or self.sizes["model"]["block_size"],
        }
        start = time.monotonic()
        if start > self.end:
            print("left out:", row, flush=True)
            return None
        if self.head["device"]:
            tf.config.experimental.reset_memory_stats("GPU:0")
        try:
            is_ours = contender != "TensorFlow dense"
            with contextlib.nullcontext() if is_ours else tensorflow_attention():
                seconds = seconds_of_steps(self.train_function(row), steps)
            row.update(seconds_a_step=statistics.median(seconds), seconds=seconds)
        except tf.errors.ResourceExhaustedError:
            row["error"] = "out of memory"
        except tf.errors.OpError as error:
            row["error"] = error.message[:300]
        if self.head["device"]:
            info = tf.config.experimental.get_memory_info("GPU:0")
            row["peak_bytes"] = info["peak"]
        row["wall_seconds"] = time.monotonic() - start
        self.rows.append(row)
        print(as_line(row), flush=True)
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"head": self.head, "rows": self.rows}, indent=1)
            (self.out / "gpu_training.json").write_text(text + "\n")
        # TensorFlow keeps custom gradients, and what they refer to, for ever.
        while self.variables:
            variable = self.variables.pop().value
            tf.raw_ops.AssignVariableOp(resource=variable.handle, value=tf.zeros([0]))
        keras.utils.clear_session()
        return row

    def train_function(self, row):
        """A step of Keras `fit`, as a function of nothing that returns the loss."""
        model = sa.SparseTransformer(
            vocab_size=256,
            time=row["length"],
            layers=row["layers"],
            attention=ATTENTION[row["attention"]],
            recompute=row["recompute"],
            dtype="mixed_bfloat16",
            **{**self.sizes["model"], "block_size": row["block_size"]},
        )
        model.build((None, row["length"]))
        self.variables = list(model.trainable_variables)
        model.compile(
            "adam",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=self.head["compiled_by_xla"],
        )
        model.optimizer.build(model.trainable_variables)
        tokens = np.random.randint(0, 256, [row["batch"], row["length"] + 1], np.int32)
        dataset = tf.data.Dataset.from_tensors((tokens[:, :-1], tokens[:, 1:]))
        batches = iter(dataset.repeat().prefetch(2))
        model.make_train_function()
        return lambda: model.train_function(batches)["loss"]


def tensorflow_attention():
    """The layer's op replaced by TensorFlow's own, for as long as a model is traced."""

    def attention(q, k, v, block_mask, heads, kv_heads, **no_rule):
        return sa.attention_impl(q, k, v, heads, "all")

    layer = sa.SparseSelfAttention.call.__globals__
    return mock.patch.dict(layer, block_sparse_attention=attention)


def seconds_of_steps(train, steps):
    """Of each of them, after two that trace, compile and allocate."""
    seconds = []
    with turns.preparing():
        for _ in range(2):
            train().numpy()
    with turns.timing():
        for _ in range(steps):
            start = time.perf_counter()
            train().numpy()  # the copy of the loss waits for all launched before it
            seconds.append(time.perf_counter() - start)
    return seconds


def as_line(row):
    label = "{part}: {attention}, T {length}, batch {batch}, {layers} layers{more}"
    label = label.format(**row, more=", recompute" if row["recompute"] else "")
    if "error" in row:
        return f"{label}: {row['error']} ({row['wall_seconds']:.0f} s)"
    seconds = row["seconds_a_step"]
    return (
        f"{label}: {seconds:.4f} s/step, {seconds / row['batch']:.4f} s/sequence, "
        f"peak {row.get('peak_bytes', 0) / 1e9:.2f} GB ({row['wall_seconds']:.0f} s)"
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["speed", "memory", "length", "million"]
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--attention", nargs="*", choices=ATTENTION, default=ATTENTION)
    parser.add_argument("--uncompiled", action="store_true", help="without XLA")
    parser.add_argument("--seconds", type=float, default=340)
    parser.add_argument("--out", type=pathlib.Path, help="folder for the rows as JSON")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    benchmark = Benchmark(options)
    for part in options.parts:
        getattr(benchmark, part)()


if __name__ == "__main__":
    main()
