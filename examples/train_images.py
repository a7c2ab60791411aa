"""Trains a model of images, byte by byte, and has it draw some.

    python examples/train_images.py                              5 minutes on 2 CPU cores
    python examples/train_images.py --data FOLDER                of PNG or JPEG files
    python examples/train_images.py --preset gpu --data cifar-10-batches-bin

An image is size x size x 3 tokens: the red, green and blue bytes of a row's pixels, row
after row. This is the Sparse Transformer paper's model of images: each layer attends to one
row's length of tokens before (local) or to the tokens above (strided), by turns, and a
position's embedding is the sum of its row's, its column's and its channel's.

The data are a folder of PNG or JPEG files, CIFAR-10's binary version, or photographs that an
installed package brings: scikit-image, else scikit-learn, else Matplotlib; pictures.py says
how they are cut. A pattern's folder in --output holds a run as train_lm.py's does, and the
same command goes on from there after Ctrl-C or a kill. Besides it has

    samples.png        images that the model draws from nothing
    completions.png    in each row the upper half of a test image, the model's
                       completions of it, and the image
"""

import argparse
import os
import sys
import zlib
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras  # noqa: E402
import numpy as np  # noqa: E402
import pictures  # noqa: E402
import tensorflow as tf  # noqa: E402
from runs import check_folder  # noqa: E402
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

PRESETS = {
    "cpu": {
        "size": 16,
        "layers": 4,
        "width": 64,
        "heads": 4,
        "block_size": 16,
        "dropout": 0.0,
        "recompute": False,
        "dtype": "float32",
        "batch": 4,
        "steps": 2400,
        "steps_per_epoch": 200,
        "eval_batches": 16,
        "learning_rate": 1e-2,
    },
    "gpu": {
        "size": 32,
        "layers": 32,
        "width": 256,
        "heads": 2,
        "block_size": 32,
        "dropout": 0.0,
        "recompute": True,
        "dtype": "mixed_bfloat16",
        "batch": 16,
        "steps": 3000,
        "steps_per_epoch": 100,
        "eval_batches": 16,
        "learning_rate": 3e-3,
    },
}
MODEL_SETTINGS = "layers width heads block_size dropout recompute dtype".split()
# The token before the first; the position says that it is no part of an image.
START = 0
COLUMNS = 8  # of samples
COMPLETIONS = 6, 3  # images, and completions of each


def main(argv=None):
    parser = argument_parser()
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args(argv)
    folder = args.output / args.attention
    try:
        check_numbers(args)
        data, words = pictures.read(args.data, args.size)
        config = run_config(args, data)
        sa.SparseTransformer(**config["model"])  # raises where it cannot be
        check_folder(folder, config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    counts = ", ".join(f"{len(x):,} to {name}" for name, x in zip(pictures.PARTS, data))
    print(f"data: {words}; images of {args.size} x {args.size}: {counts}")
    try:
        model = train(args.attention, config, data, folder)
        draw_all(args.output, config, words)
        draw_images(model, data.test, folder, args.seed)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from the checkpoint in {folder}")
        return 130
    return 0


def argument_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention", choices=models(), default="strided")
    parser.add_argument("--data", type=Path, help="a folder; else sample photographs")
    parser.add_argument("--output", type=Path, default=Path("train_images"))
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    add_settings(parser, PRESETS["cpu"])
    return parser


def check_numbers(args):
    for name in ("size", "batch", "eval_batches"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    if args.size % 2:
        raise ValueError(f"size must be even, got {args.size}")
    check_steps(args)


def run_config(args, data):
    axes = [args.size, args.size, 3]
    model = {name: getattr(args, name) for name in MODEL_SETTINGS}
    model.update(
        vocab_size=256,
        time=int(np.prod(axes)),
        position_axes=axes,
        attention=models()[args.attention],
        local_attn_ctx=3 * args.size,  # a row of pixels
    )
    rest = {name: getattr(args, name) for name in PRESETS["cpu"] if name not in model}
    sums = [zlib.crc32(part) for part in data]
    rest.update(seed=args.seed, data_bytes=sum(x.nbytes for x in data), data_crc32=sums)
    return {"model": model, "training": rest}


# ---- training ----


def train(name, config, data, folder):
    training = config["training"]
    keras.utils.set_random_seed(training["seed"])
    model = sa.SparseTransformer(**config["model"])
    optimizer = keras.optimizers.Muon(learning_rate(training))
    compile_model(model, optimizer, sa.SparseSelfAttention(1).supports_jit)
    run(
        name,
        model,
        config,
        folder,
        lambda step: batches(data.train, training, step),
        eval_batches(data.valid, training),
        eval_batches(data.test, training),
        unit="dim",
    )
    return model


def batches(images, training, first_step):
    """From `first_step` on: any images, some mirrored, by the seed and the step alone."""

    def generate():
        for step in range(first_step, training["steps"]):
            random = np.random.RandomState([training["seed"], step])
            chosen = images[random.randint(len(images), size=training["batch"])]
            is_mirrored = random.randint(2, size=len(chosen)) == 1
            chosen[is_mirrored] = chosen[is_mirrored, :, ::-1]
            yield next_tokens(chosen)

    spec = tf.TensorSpec([training["batch"], images[0].size], tf.int32)
    dataset = tf.data.Dataset.from_generator(generate, output_signature=(spec, spec))
    return dataset.prefetch(2)


def eval_batches(images, training):
    """Images at even distances, the same each time."""
    count = training["eval_batches"] * training["batch"]
    chosen = images[np.linspace(0, len(images) - 1, count).astype(int)]
    dataset = tf.data.Dataset.from_tensor_slices(next_tokens(chosen))
    return dataset.batch(training["batch"], drop_remainder=True)


def tokens_of(images):
    """int32 [images, size * size * 3]"""
    return images.reshape(len(images), -1).astype(np.int32)


def next_tokens(images):
    """Tokens, and those that follow each; the first follows `START`."""
    tokens = tokens_of(images)
    return np.pad(tokens[:, :-1], [(0, 0), (1, 0)], constant_values=START), tokens


# ---- drawing ----


def draw_images(model, test, folder, seed):
    size = test.shape[1]
    scale = max(1, 96 // size)
    prompts = np.full([COLUMNS**2 // 2, 1], START)
    samples, statistics = sa.generate(model, prompts, model.time, seed=seed)
    samples = samples.astype(np.uint8).reshape(-1, COLUMNS, size, size, 3)
    pictures.save_grid(folder / "samples.png", samples, scale)
    rows, columns = COMPLETIONS
    originals = test[np.linspace(0, len(test) - 1, rows).astype(int)]
    given = tokens_of(originals)[:, : model.time // 2].repeat(columns, axis=0)
    prompts = np.pad(given, [(0, 0), (1, 0)], constant_values=START)
    rest, _ = sa.generate(model, prompts, model.time // 2, seed=seed)
    completed = np.concatenate([given, rest], axis=1).astype(np.uint8)
    completed = completed.reshape(rows, columns, size, size, 3)
    halves = originals.copy()
    halves[:, size // 2 :] = 128
    table = np.concatenate([halves[:, None], completed, originals[:, None]], axis=1)
    pictures.save_grid(folder / "completions.png", table, scale)
    print(
        f"{folder}: samples.png and completions.png; "
        f"{1000 * statistics.seconds_per_token:.1f} ms for a token of {len(samples) * COLUMNS} "
        "images at once"
    )


if __name__ == "__main__":
    sys.exit(main())
