"""KerasHub's GPT-2 and Llama, with flash attention on and off: milliseconds of a step.

Both have 12 layers of width 768 with 12 heads of 64 (Llama: 4 key heads), random weights
and as many tokens a step at every length. They are compiled as KerasHub's user would,
`model.compile("adam", ...)`, and timed through `train_on_batch`.
  off   Keras's own attention, which TensorFlow's backend has
  on    the same model under `sa.enable_flash_attention()`

    python benchmarks/keras_hub_models.py --lengths 1024 2048 4096 8192 --out keras_hub.json

It needs KerasHub, as `make test-keras-hub` installs it.
"""

import argparse
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras  # noqa: E402
import keras_hub  # noqa: E402
import numpy as np  # noqa: E402
from keras_model import POLICIES, head_of_report, measured, report  # noqa: E402

VOCABULARY = {"gpt2": 50257, "llama": 32000}
WIDTH, HEADS, KV_HEADS = 768, 12, 4


def model_of(name, length, layers):
    if name == "gpt2":
        backbone = keras_hub.models.GPT2Backbone(
            *(VOCABULARY[name], layers, HEADS, WIDTH, 4 * WIDTH),
            dropout=0.0,
            max_sequence_length=length,
        )
        model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    else:
        backbone = keras_hub.models.LlamaBackbone(
            *(VOCABULARY[name], layers, HEADS, WIDTH, 4 * WIDTH, KV_HEADS)
        )
        model = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, weighted_metrics=[])
    return model


def measure(name, policy, length, flash, options):
    """The row of one model: its median step, and the peak of the GPU's memory."""
    batch = max(options.tokens // length, 1)
    tokens = np.random.RandomState(0).randint(
        VOCABULARY[name], size=[batch, length + 1]
    )
    x = {
        "token_ids": tokens[:, :-1].astype(np.int32),
        "padding_mask": np.ones([batch, length], bool),
    }
    row = dict(model=name, policy=policy, batch=batch, length=length, flash=flash)
    return measured(
        row,
        policy,
        flash == "on",
        lambda: model_of(name, length, options.layers),
        (x, tokens[:, 1:], options.steps),
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="*", choices=list(VOCABULARY), default=list(VOCABULARY)
    )
    parser.add_argument("--policies", nargs="*", choices=POLICIES, default=POLICIES[2:])
    parser.add_argument(
        "--lengths", nargs="*", type=int, default=[1024, 2048, 4096, 8192]
    )
    parser.add_argument(
        "--flash", nargs="*", choices=["off", "on"], default=["off", "on"]
    )
    parser.add_argument("--tokens", type=int, default=16384, help="of a step")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, help="file for the rows as JSON")
    options = parser.parse_args(arguments)
    rows = (
        measure(name, policy, length, flash, options)
        for name in options.models
        for policy in options.policies
        for length in options.lengths
        for flash in options.flash
    )
    head = {**head_of_report(), "keras_hub": keras_hub.__version__}
    return report(head, rows, options.out)


if __name__ == "__main__":
    main()
