"""A user's Keras model, with one layer exchanged: milliseconds of a training step.

The model has 4 blocks of LayerNormalization, attention, LayerNormalization, Dense 2048
with gelu and Dense 512, with residuals, width 512, 8 heads of 64. It is compiled as
`model.compile("adam", "mse")`, so that Keras decides about XLA, and timed through
`train_on_batch`, as the user runs it. The attention is one of
  MultiHeadAttention  `keras.layers.MultiHeadAttention` with `use_causal_mask=True`
  flash_attention     the same layer, under `sa.enable_flash_attention()`
  a pattern's name    `sa.SparseSelfAttention` with that pattern and windows of 128
  none                no attention: what the rest of the model takes

    python benchmarks/keras_model.py --shapes 4x4096 8x1024 16x512 --out keras_model.json
"""

import argparse
import json
import os
import pathlib
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import turns  # noqa: E402

import sparse_attention as sa  # noqa: E402
from sparse_attention.plan.patterns import PATTERNS  # noqa: E402

WIDTH, HEADS, BLOCKS = 512, 8, 4
CONTENDERS = ("MultiHeadAttention", "flash_attention", *PATTERNS, "none")
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")


def attend(contender, x):
    if contender == "none":
        return x
    if contender in ("MultiHeadAttention", "flash_attention"):
        layer = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)
        return layer(x, x, use_causal_mask=True)
    return sa.SparseSelfAttention(HEADS, attn_mode=contender, local_attn_ctx=128)(x)


def model_of(contender, length, jit_compile):
    x = inputs = keras.Input([length, WIDTH])
    for _ in range(BLOCKS):
        x = x + attend(contender, keras.layers.LayerNormalization()(x))
        h = keras.layers.LayerNormalization()(x)
        h = keras.layers.Dense(4 * WIDTH, activation="gelu")(h)
        x = x + keras.layers.Dense(WIDTH)(h)
    model = keras.Model(inputs, x)
    model.compile("adam", "mse", jit_compile=jit_compile)
    return model


def measure(policy, batch, length, contender, steps, jit_compile="auto"):
    """The row of one model: its median step, and the peak of the GPU's memory."""
    x, y = np.random.RandomState(0).normal(size=[2, batch, length, WIDTH])
    with tf.device("GPU:0" if sees_gpu() else "CPU:0"):
        x, y = tf.constant(x, tf.float32), tf.constant(y, tf.float32)
    row = dict(policy=policy, batch=batch, length=length, contender=contender)
    return measured(
        row,
        policy,
        contender == "flash_attention",
        lambda: model_of(contender, length, jit_compile),
        (x, y, steps),
    )


def measured(row, policy, is_flash, make_model, batch_and_steps):
    """The row, with what `time_steps` finds under a policy, or the error that came.

    Args:
      row: What says which model it is.
      is_flash: Whether `sa.enable_flash_attention()` is on.
      make_model: () -> a compiled model.
      batch_and_steps: The other arguments of `time_steps`.
    """
    keras.mixed_precision.set_global_policy(policy)
    keras.utils.set_random_seed(0)
    if is_flash:
        sa.enable_flash_attention()
    try:
        with turns.preparing():
            model = make_model()
        row["jit_compile"] = model.jit_compile
        row.update(time_steps(model, *batch_and_steps))
    except (tf.errors.ResourceExhaustedError, tf.errors.InternalError) as error:
        row["error"] = error.message[:200]
    finally:
        sa.disable_flash_attention()
    keras.utils.clear_session()
    return row


def time_steps(model, x, y, steps):
    """The median time of `train_on_batch`, after three, and the peak of the GPU's memory."""
    seconds, row = [], {}
    with turns.preparing():
        for _ in range(3):
            model.train_on_batch(x, y)
    if sees_gpu():
        tf.config.experimental.reset_memory_stats("GPU:0")
    with turns.timing():
        for _ in range(steps):
            start = time.perf_counter()
            model.train_on_batch(x, y)  # it returns the loss as a number: it waits
            seconds.append(time.perf_counter() - start)
    row["ms"] = round(1e3 * statistics.median(seconds), 3)
    row["spread_ms"] = [round(1e3 * f(seconds), 3) for f in (min, max)]
    if sees_gpu():
        row["peak_bytes"] = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return row


def report(head, rows, out):
    """Prints head and rows as they come, and keeps them in the file `out`, if there is one."""
    print(head, flush=True)
    found = []
    for row in rows:
        found.append(row)
        print(row, flush=True)
        if out:
            out.write_text(json.dumps({"head": head, "rows": found}, indent=1) + "\n")
    return found


def head_of_report():
    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    return {
        "device": details[0]["device_name"] if gpus else "CPU",
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
    }


def sees_gpu():
    return bool(tf.config.list_physical_devices("GPU"))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=["4x4096", "8x1024", "16x512"])
    parser.add_argument(
        "--policies", nargs="*", choices=POLICIES, default=["float32", "mixed_bfloat16"]
    )
    parser.add_argument(
        "--contenders",
        nargs="*",
        choices=CONTENDERS,
        default=["MultiHeadAttention", "fixed"],
    )
    parser.add_argument(
        "--jit-compile",
        action="store_true",
        help="compile by XLA on a CPU too, where Keras does not by itself",
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, help="file for the rows as JSON")
    options = parser.parse_args(arguments)
    rows = (
        measure(policy, *shape, contender, options.steps, options.jit_compile or "auto")
        for policy in options.policies
        for shape in [tuple(map(int, s.split("x"))) for s in options.shapes]
        for contender in options.contenders
    )
    return report(head_of_report(), rows, options.out)


if __name__ == "__main__":
    main()
