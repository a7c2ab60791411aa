"""Trains a language model on bytes, and compares attention patterns.

    python examples/train_lm.py                                   2 minutes on 2 CPU cores
    python examples/train_lm.py --attention dense,fixed,strided   one after the other
    python examples/train_lm.py --preset gpu --data enwik8        12,288 positions

The data are the source files of Python's standard library, or a file: 90 % to train, 5 %
to validate and 5 % to test. Each pattern has a folder in --output, which holds

    config.json              what was asked for
    checkpoint.weights.h5    model and optimizer as of the last epoch
    curve.json               steps, seconds and bits per byte of each epoch

The same command goes on from there after Ctrl-C or a kill, to the same weights as without:
the batch of a step depends on nothing but the seed and the step, and TensorFlow is told to
add in the same order each time. With more --steps a run goes on after its end, at the
learning rates of a run of so many steps. The curves of all patterns of one data and model are
drawn into curves.png.

Several devices: --strategy mirrored takes all GPUs of this machine, or else cuts its CPU in
two; --strategy multiworker the machines that the environment variable TF_CONFIG lists,

    TF_CONFIG='{"cluster": {"worker": ["host0:2222", "host1:2222"]},
                "task": {"type": "worker", "index": 0}}'

where the index is another on each, and --output a folder that all of them see.
"""

import argparse
import json
import os
import sys
import sysconfig
import time
import zlib
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import draw_curves  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import sparse_attention as sa  # noqa: E402
from sparse_attention.plan.masks import NUM_VERTS, VERTSIZE  # noqa: E402
from sparse_attention.plan.patterns import PAPERS_MODELS, PATTERNS  # noqa: E402

PRESETS = {
    "cpu": {
        "time": 1024,
        "layers": 4,
        "width": 128,
        "heads": 4,
        "local_attn_ctx": 128,
        "block_size": 32,
        "num_verts": NUM_VERTS,
        "vertsize": VERTSIZE,
        "dropout": 0.0,
        "recompute": False,
        "dtype": "float32",
        "batch": 4,
        "steps": 240,
        "steps_per_epoch": 30,
        "eval_batches": 4,
        "learning_rate": 3e-3,
    },
    "gpu": {
        "time": 12288,
        "layers": 12,
        "width": 512,
        "heads": 8,
        "local_attn_ctx": 128,
        "block_size": 32,
        "num_verts": NUM_VERTS,
        "vertsize": VERTSIZE,
        "dropout": 0.0,
        "recompute": True,
        "dtype": "mixed_bfloat16",
        "batch": 4,
        "steps": 10000,
        "steps_per_epoch": 250,
        "eval_batches": 16,
        "learning_rate": 5e-4,
    },
}
MODEL_SETTINGS = (
    "time layers width heads local_attn_ctx block_size num_verts vertsize dropout "
    "recompute dtype"
).split()
# A run goes on to more steps, and recomputation changes no number.
MAY_CHANGE = ("steps", "recompute")


def main(argv=None):
    parser = argument_parser()
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args(argv)
    try:
        strategy = make_strategy(args.strategy)
        data = read_data(args.data)
        check_sizes(args, len(data), strategy.num_replicas_in_sync)
        runs = {}
        for name in args.attention.split(","):
            if name not in models():
                raise ValueError(f"attention must be of {list(models())}, got {name}")
            config = run_config(args, name, data)
            sa.SparseTransformer(**config["model"])  # raises where it cannot be
            check_folder(args.output / name, config)
            runs[name] = config
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        for name, config in runs.items():
            train(name, config, data, args.output / name, strategy)
            if is_chief(strategy):
                data_name = (
                    args.data.name if args.data else draw_curves.STANDARD_LIBRARY
                )
                draw_all(args.output, config, data_name)
    except KeyboardInterrupt:
        print(
            f"\nstopped; the same command goes on from the checkpoint in {args.output}"
        )
        return 130
    except tf.errors.OpError as error:
        if args.strategy != "multiworker":
            raise
        print(f"start all workers again to go on from the checkpoint: {error.message}")
        sys.stdout.flush()
        os._exit(1)  # or TensorFlow waits, at exit, for the worker that is gone
    return 0


def models():
    """{name: the patterns of its layers in turn}, the paper's models first."""
    alone = {name: name for name in PATTERNS if name not in PAPERS_MODELS}
    return {**PAPERS_MODELS, **alone}


def argument_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--attention", default="fixed", help="of " + ", ".join(models())
    )
    parser.add_argument("--data", type=Path, help="a file; else the standard library")
    parser.add_argument("--output", type=Path, default=Path("train_lm"))
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--strategy", choices=["none", "mirrored", "multiworker"], default="none"
    )
    parser.add_argument("--seed", type=int, default=0)
    for name, value in PRESETS["cpu"].items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(option, type=type(value))
    return parser


# ---- before training ----


def make_strategy(name):
    if name == "none":
        return tf.distribute.get_strategy()
    if name == "multiworker":
        if "TF_CONFIG" not in os.environ:
            raise ValueError("strategy multiworker needs the environment's TF_CONFIG")
        return tf.distribute.MultiWorkerMirroredStrategy()
    if tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy()
    cpu = tf.config.list_physical_devices("CPU")[0]
    halves = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, halves)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def is_chief(strategy):
    """Whether this process is the one that writes files."""
    resolver = strategy.cluster_resolver
    return resolver is None or resolver.task_type == "chief" or resolver.task_id == 0


def read_data(path):
    if path is not None:
        return path.read_bytes()
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        file
        for file in root.rglob("*.py")
        if not {"site-packages", "dist-packages"} & set(file.parts)
    )
    return b"".join(file.read_bytes() for file in files)


def check_sizes(args, data_bytes, replicas):
    needed = 20 * (args.time + 1)  # so that a twentieth holds a sequence and a target
    if data_bytes < needed:
        raise ValueError(
            f"data must have at least {needed} bytes for time={args.time}, got {data_bytes}"
        )
    if args.batch < 1 or args.batch % replicas:
        raise ValueError(
            f"batch must be a multiple of the {replicas} devices, got {args.batch}"
        )
    if args.steps < 1 or args.steps_per_epoch < 1 or args.steps % args.steps_per_epoch:
        raise ValueError(
            f"steps must be a multiple of steps_per_epoch={args.steps_per_epoch}, "
            f"got {args.steps}"
        )


def run_config(args, attention, data):
    model = {name: getattr(args, name) for name in MODEL_SETTINGS}
    model.update(vocab_size=256, attention=models()[attention])
    rest = {name: getattr(args, name) for name in PRESETS["cpu"] if name not in model}
    rest.update(seed=args.seed, data_bytes=len(data), data_crc32=zlib.crc32(data))
    return {"model": model, "training": rest}


def check_folder(folder, config):
    """Raises if the folder holds a run that this one cannot go on from."""
    if not (folder / "config.json").exists():
        return
    saved = json.loads((folder / "config.json").read_text())
    found = differences(saved, config, but=MAY_CHANGE)
    if found:
        raise ValueError(
            f"{folder} holds a run of another configuration: {'; '.join(found)}; "
            "choose another --output"
        )
    curve, steps = read_curve(folder), config["training"]["steps"]
    if curve and steps < curve[-1]["step"]:
        raise ValueError(
            f"steps must be at least {curve[-1]['step']}, which the run in {folder} has "
            f"behind it, got {steps}; choose another --output"
        )


def differences(saved, config, but):
    """[str]: the settings in which two configurations differ, apart from some."""
    return [
        f"{name} = {saved[part].get(name)} there, {value} here"
        for part in config
        for name, value in config[part].items()
        if name not in but and saved[part].get(name) != value
    ]


def read_curve(folder):
    path = folder / "curve.json"
    return json.loads(path.read_text()) if path.exists() else []


# ---- training ----


def train(name, config, data, folder, strategy):
    training, time_ = config["training"], config["model"]["time"]
    with strategy.scope():
        keras.utils.set_random_seed(training["seed"])
        model = sa.SparseTransformer(**config["model"])
        model.build((None, time_))
        model.compile(
            sa.Adam(learning_rate(training)),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[BitsPerByte(name="bits_per_byte")],
        )
        model.optimizer.build(model.trainable_variables)
    keeper = Keeper(folder, config, is_chief(strategy))
    step = keeper.restore(model)
    splits = [len(data) * percent // 100 for percent in (0, 90, 95, 100)]
    training_data, valid, test = (
        data[start:end] for start, end in zip(splits, splits[1:])
    )
    print(
        f"{name}: {model.count_params():,} weights, step {step} of {training['steps']}"
    )
    model.fit(
        batches(training_data, time_, training, step),
        epochs=training["steps"] // training["steps_per_epoch"],
        initial_epoch=step // training["steps_per_epoch"],
        steps_per_epoch=training["steps_per_epoch"],
        validation_data=eval_batches(valid, time_, training),
        callbacks=[keeper],
        shuffle=False,  # they come in order
        verbose="auto" if is_chief(strategy) else 0,
    )
    bits = model.evaluate(
        eval_batches(test, time_, training), verbose=0, return_dict=True
    )["bits_per_byte"]
    epochs = np.diff([0, *[row["seconds"] for row in keeper.curve]])
    seconds = np.median(epochs) / training["steps_per_epoch"]
    print(f"{name}: {bits:.4f} bits per byte on the test data, {seconds:.3f} s/step")


def learning_rate(training):
    """Up for a tenth of the steps, then down along a cosine to a tenth."""
    warmup_steps = training["steps"] // 10
    return keras.optimizers.schedules.CosineDecay(
        0.0,
        training["steps"] - warmup_steps,
        alpha=0.1,
        warmup_target=training["learning_rate"],
        warmup_steps=warmup_steps,
    )


class BitsPerByte(keras.metrics.SparseCategoricalCrossentropy):
    def __init__(self, name):
        super().__init__(name, from_logits=True)

    def result(self):
        return super().result() / np.log(2)


class Keeper(keras.callbacks.Callback):
    """Keeps what a run needs to go on: a file is whole, or it is the one before."""

    def __init__(self, folder, config, is_chief):
        super().__init__()
        self.folder = folder
        self.config = config
        self.is_chief = is_chief
        self.checkpoint = folder / "checkpoint.weights.h5"
        self.curve = []

    def restore(self, model):
        """Loads the checkpoint, if there is one; returns the steps behind it."""
        if not self.checkpoint.exists():
            return 0
        model.load_weights(self.checkpoint)
        step = int(model.optimizer.iterations.numpy())
        self.curve = [row for row in read_curve(self.folder) if row["step"] <= step]
        return step

    def on_train_begin(self, logs=None):
        self.write("config.json", json.dumps(self.config, indent=1))
        self.save()

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_test_begin(self, logs=None):  # validation is not counted
        self.seconds = time.perf_counter() - self.start

    def on_epoch_end(self, epoch, logs=None):
        before = self.curve[-1]["seconds"] if self.curve else 0
        self.curve.append(
            {
                "step": int(self.model.optimizer.iterations.numpy()),
                "seconds": before + self.seconds,
                "train": logs["bits_per_byte"],
                "valid": logs["val_bits_per_byte"],
            }
        )
        self.save()

    def save(self):
        """The curve first: rows that the checkpoint does not know are left out later."""
        self.write("curve.json", json.dumps(self.curve, indent=1))
        if self.is_chief:
            new = self.folder / "new.weights.h5"
            self.model.save_weights(new)
            new.replace(self.checkpoint)

    def write(self, name, text):
        if self.is_chief:
            self.folder.mkdir(parents=True, exist_ok=True)
            new = self.folder / "new.json"
            new.write_text(text)
            new.replace(self.folder / name)


# ---- batches ----


def batches(data, length, training, first_step):
    """From `first_step` on: sequences from anywhere, by the seed and the step alone."""
    with tf.device("CPU"):
        data = tf.constant(np.frombuffer(data, np.uint8))

    def batch(step):
        starts = tf.random.stateless_uniform(
            [training["batch"]],
            [training["seed"], step],
            0,
            len(data) - length,
            tf.int64,
        )
        return sequences(data, starts, length)

    return sharded(tf.data.Dataset.range(first_step, training["steps"]).map(batch))


def eval_batches(data, length, training):
    """Sequences at even distances, the same each time."""
    count = training["eval_batches"] * training["batch"]
    starts = np.linspace(0, len(data) - length - 1, count).astype(np.int64)
    with tf.device("CPU"):
        data = tf.constant(np.frombuffer(data, np.uint8))
    dataset = tf.data.Dataset.from_tensor_slices(starts).batch(training["batch"], True)
    return sharded(dataset.map(lambda starts: sequences(data, starts, length)))


def sequences(data, starts, length):
    """Tokens, int32 [batch, length], and the ones that follow them."""
    positions = starts[:, None] + tf.range(length + 1, dtype=tf.int64)
    tokens = tf.cast(tf.gather(data, positions), tf.int32)
    return tokens[:, :-1], tokens[:, 1:]


def sharded(dataset):
    """Has each worker take its part of every batch."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return dataset.with_options(options).prefetch(2)


# ---- curves ----


def draw_all(folder, config, data):
    """Draws the patterns that have a run there of this data and model, named `data`."""
    curves = {}
    for path in sorted(folder.glob("*/curve.json")):
        there = json.loads((path.parent / "config.json").read_text())
        if not differences(there, config, but=(*MAY_CHANGE, "attention")):
            curves[path.parent.name] = json.loads(path.read_text())
    draw_curves.draw(curves, config, data, folder / "curves.png")


if __name__ == "__main__":
    # For the whole process, which is why it is not in main().
    tf.config.experimental.enable_op_determinism()
    sys.exit(main())
