"""Trains a language model on bytes, and compares attention patterns.

    python examples/train_lm.py                                   5 minutes on 2 CPU cores
    python examples/train_lm.py --attention dense,fixed,strided   one after the other
    python examples/train_lm.py --preset gpu --data enwik8        12,288 positions
    python examples/train_lm.py --start-from train_lm/fixed --data mine.txt --output mine

The data are the source files of Python's standard library, or a file: 90 % to train, 5 %
to validate and 5 % to test. Each pattern has a folder in --output, which runs.py describes.

The same command goes on from there after Ctrl-C or a kill, to the same weights as without:
the batch of a step depends on nothing but the seed and the step, and XLA and TensorFlow are
told to add in the same order each time. With more --steps a run goes on after its end, at the
learning rates of a run of so many steps. The curves of all patterns of one data and model are
drawn into curves.png.

--start-from takes the weights from the folder of another run, and its sizes; another
--attention, --time, --dropout or --dtype may be given.

Several devices: --strategy mirrored takes all GPUs of this machine, or else cuts its CPU in
two; --strategy multiworker the machines that the environment variable TF_CONFIG lists,

    TF_CONFIG='{"cluster": {"worker": ["host0:2222", "host1:2222"]},
                "task": {"type": "worker", "index": 0}}'

where the index is another on each, and --output a folder that all of them see.
"""

import argparse
import os
import sys
import zlib
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
from runs import check_folder, load_model, read_config  # noqa: E402
from text import (  # noqa: E402
    STANDARD_LIBRARY,
    batches,
    bits_per_byte_of_others,
    eval_batches,
    read_data,
    split,
)
from training import (  # noqa: E402
    add_settings,
    check_steps,
    compile_model,
    draw_all,
    learning_rate,
    models,
    run,
)

import sparse_attention as sa  # noqa: E402
from sparse_attention.plan.masks import NUM_VERTS, VERTSIZE  # noqa: E402

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
        "rotary": True,
        "dropout": 0.0,
        "recompute": False,
        "dtype": "float32",
        "batch": 2,
        "steps": 960,
        "steps_per_epoch": 120,
        "eval_batches": 16,
        "optimizer": "muon",
        "learning_rate": 1e-2,
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
        "rotary": True,
        "dropout": 0.0,
        "recompute": True,
        "dtype": "mixed_bfloat16",
        "batch": 4,
        "steps": 10000,
        "steps_per_epoch": 250,
        "eval_batches": 16,
        "optimizer": "muon",
        "learning_rate": 3e-3,
    },
}
MODEL_SETTINGS = (
    "time layers width heads local_attn_ctx block_size num_verts vertsize rotary dropout "
    "recompute dtype"
).split()


def main(argv=None, deterministic=False):
    """Trains; `deterministic` turns it on in the whole process, where it is an option."""
    parser = argument_parser()
    known = parser.parse_known_args(argv)[0]
    parser.set_defaults(**PRESETS[known.preset])
    try:
        source = load_model(known.start_from) if known.start_from else None
        if source is not None:
            config = read_config(known.start_from)["model"]
            parser.set_defaults(**{name: config[name] for name in MODEL_SETTINGS})
        args = parser.parse_args(argv)
        strategy = make_strategy(args.strategy)
        compiled = is_compiled(strategy)
        if deterministic and not compiled:  # with it, Keras does not compile
            tf.config.experimental.enable_op_determinism()
        data = read_data(args.data)
        check_sizes(args, len(data), strategy.num_replicas_in_sync)
        runs = {}
        for name in args.attention.split(","):
            if name not in models():
                raise ValueError(f"attention must be of {list(models())}, got {name}")
            config = run_config(args, name, data)
            model = sa.SparseTransformer(**config["model"])  # raises where it cannot be
            if source is not None:
                model.take_weights(source)
            check_folder(args.output / name, config)
            runs[name] = config
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        for name, config in runs.items():
            train(name, config, data, args.output / name, strategy, compiled, source)
            if is_chief(strategy):
                data_name = args.data.name if args.data else STANDARD_LIBRARY
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


def argument_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--attention", default="fixed", help="of " + ", ".join(models())
    )
    parser.add_argument("--data", type=Path, help="a file; else the standard library")
    parser.add_argument("--output", type=Path, default=Path("train_lm"))
    parser.add_argument("--start-from", type=Path, help="the folder of another run")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--strategy", choices=["none", "mirrored", "multiworker"], default="none"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_settings(parser, PRESETS["cpu"])
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


def is_compiled(strategy):
    """Whether XLA compiles a step: of one device, where it knows our op."""
    is_alone = strategy.num_replicas_in_sync == 1 and strategy.cluster_resolver is None
    return is_alone and sa.SparseSelfAttention(1).supports_jit


def is_chief(strategy):
    """Whether this process is the one that writes files."""
    resolver = strategy.cluster_resolver
    return resolver is None or resolver.task_type == "chief" or resolver.task_id == 0


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
    check_steps(args)


def run_config(args, attention, data):
    model = {name: getattr(args, name) for name in MODEL_SETTINGS}
    model.update(vocab_size=256, attention=models()[attention])
    rest = {name: getattr(args, name) for name in PRESETS["cpu"] if name not in model}
    rest.update(seed=args.seed, data_bytes=len(data), data_crc32=zlib.crc32(data))
    rest.update(start_from=str(args.start_from) if args.start_from else None)
    return {"model": model, "training": rest}


# ---- training ----


def train(name, config, data, folder, strategy, compiled, source=None):
    training, length = config["training"], config["model"]["time"]
    with strategy.scope():
        keras.utils.set_random_seed(training["seed"])
        model = sa.SparseTransformer(**config["model"])
        compile_model(model, optimizer(training), compiled)
    if source is not None:
        model.take_weights(source)
    training_data, valid, test = split(data)
    run(
        name,
        model,
        config,
        folder,
        lambda step: batches(training_data, length, training, step),
        eval_batches(valid, length, training),
        eval_batches(test, length, training),
        is_chief(strategy),
    )
    others = bits_per_byte_of_others(training_data, test).items()
    print("others: " + ", ".join(f"{bits:.4f} {other}" for other, bits in others))


def optimizer(training):
    """Keras's Muon, which learns from far fewer bytes, or Adam."""
    if training["optimizer"] == "adam":
        return keras.optimizers.Adam(learning_rate(training))
    return keras.optimizers.Muon(learning_rate(training))


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    )
    sys.exit(main(deterministic=True))
