"""What the scripts that train a SparseTransformer share: options, schedule and the run itself."""

import argparse
import json

import draw_curves
import keras
import numpy as np
from runs import MAY_CHANGE, Keeper, differences, read_config

from sparse_attention.plan.patterns import PAPERS_MODELS, PATTERNS


def models():
    """{name: the patterns of its layers in turn}, the paper's models first."""
    alone = {name: name for name in PATTERNS if name not in PAPERS_MODELS}
    return {**PAPERS_MODELS, **alone}


def add_settings(parser, settings):
    """An option for each of a preset's settings, which has no default yet."""
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction)
        elif name == "optimizer":
            parser.add_argument(option, choices=["muon", "adam"])
        else:
            parser.add_argument(option, type=type(value))


def check_steps(args):
    if args.steps < 1 or args.steps_per_epoch < 1 or args.steps % args.steps_per_epoch:
        raise ValueError(
            f"steps must be a multiple of steps_per_epoch={args.steps_per_epoch}, "
            f"got {args.steps}"
        )


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


def compile_model(model, optimizer, compiled):
    """Builds the model for bytes; `compiled`: whether XLA compiles its steps."""
    model.build((None, model.time))
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[BitsPerByte(name="bits_per_byte")],
        jit_compile=compiled,
    )
    model.optimizer.build(model.trainable_variables)


def run(
    name, model, config, folder, data_from, valid, test, is_chief=True, unit="byte"
):
    """Trains from where the run in the folder has come to, and prints what it has learned.

    Args:
      name: Of the pattern, to print.
      model: As `compile_model` leaves it.
      config: What the folder's config.json holds.
      data_from: step -> dataset of the batches from this step on.
      valid, test: Datasets.
      is_chief: Whether this process writes files.
      unit: What a token is called.
    """
    training = config["training"]
    keeper = Keeper(folder, config, is_chief)
    step = keeper.restore(model)
    print(
        f"{name}: {model.count_params():,} weights, step {step} of {training['steps']}"
    )
    model.fit(
        data_from(step),
        epochs=training["steps"] // training["steps_per_epoch"],
        initial_epoch=step // training["steps_per_epoch"],
        steps_per_epoch=training["steps_per_epoch"],
        validation_data=valid,
        callbacks=[keeper],
        shuffle=False,  # they come in order
        verbose="auto" if is_chief else 0,
    )
    bits = model.evaluate(test, verbose=0, return_dict=True)["bits_per_byte"]
    epochs = np.diff([0, *[row["seconds"] for row in keeper.curve]])
    seconds = np.median(epochs) / training["steps_per_epoch"]
    print(f"{name}: {bits:.4f} bits per {unit} on the test data, {seconds:.3f} s/step")


def draw_all(folder, config, data):
    """Draws the patterns that have a run there of this data and model, named `data`."""
    curves = {}
    for path in sorted(folder.glob("*/curve.json")):
        there = read_config(path.parent)
        if not differences(there, config, but=(*MAY_CHANGE, "attention")):
            curves[path.parent.name] = json.loads(path.read_text())
    draw_curves.draw(curves, config, data, folder / "curves.png")
