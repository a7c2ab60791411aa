"""The text that train_lm.py learns: where it comes from, its batches, and what is easy in it."""

import bz2
import lzma
import sysconfig
from pathlib import Path

import numpy as np
import tensorflow as tf

STANDARD_LIBRARY = "the source files of Python's standard library"
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def read_data(path):
    """bytes: of a file; None: Python's standard library, without its tests."""
    if path is not None:
        return path.read_bytes()
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        file
        for file in root.rglob("*.py")
        if not NOT_LIBRARY & set(file.relative_to(root).parts)
    )
    return b"".join(file.read_bytes() for file in files)


def split(data):
    """90 % to train, 5 % to validate, 5 % to test."""
    ends = [len(data) * percent // 100 for percent in (0, 90, 95, 100)]
    return [data[start:end] for start, end in zip(ends, ends[1:])]


def bits_per_byte_of_others(training_data, test):
    """{name: bits per byte of the test data}, of what a model should beat.

    A bigram table counts the pairs of bytes in the training data. The compressors see the
    test data alone.
    """
    counts = np.full([256, 256], 0.01)
    data, rest = (np.frombuffer(x, np.uint8) for x in (training_data, test))
    np.add.at(counts, (data[:-1], data[1:]), 1)
    bits = -np.log2(counts / counts.sum(1, keepdims=True))
    return {
        "bigram table": bits[rest[:-1], rest[1:]].mean(),
        "bzip2": 8 * len(bz2.compress(test)) / len(test),
        "xz": 8 * len(lzma.compress(test, preset=9)) / len(test),
    }


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
