"""A block of the Sparse Transformer, and what else the model is made of."""

from __future__ import annotations

import functools
import math

import tensorflow as tf

from ..ops.recompute import recomputable
from .backend import NotQuantized, keras
from .layers import Dense


def gelu(x):
    """x times the sigmoid of 1.702 x, which is what the paper uses."""
    return x * tf.sigmoid(1.702 * x)


class LayerNorm(NotQuantized, keras.layers.LayerNormalization):
    """Keras's, as it is."""


# Up to so many rows a product with one-hot rows takes less time than it saves.
FEW_ROWS = 1024


@tf.custom_gradient
def look_up(table, rows):
    """The rows of a table, whose gradient is a product with one-hot rows.

    TensorFlow's is a scatter. That adds in no fixed order on a GPU, or, where XLA is told to
    be deterministic, one row after the other.
    """

    def gradient(upstream):
        upstream = tf.reshape(upstream, [-1, table.shape[1]])
        one_hot = tf.one_hot(tf.reshape(rows, [-1]), table.shape[0], dtype=table.dtype)
        return tf.matmul(one_hot, upstream, transpose_a=True), None

    return tf.gather(table, rows), gradient


class Embedding(NotQuantized, keras.layers.Embedding):
    """Keras's, whose weights the model also reads by itself.

    A small one has the gradient of `look_up`.
    """

    def call(self, inputs):
        if self.input_dim > FEW_ROWS:
            return super().call(inputs)
        rows = tf.convert_to_tensor(inputs)
        if rows.dtype not in (tf.int32, tf.int64):
            rows = tf.cast(rows, tf.int32)
        # From the end if negative, as Keras counts.
        rows = tf.where(rows < 0, rows + self.input_dim, rows)
        table = tf.convert_to_tensor(self.embeddings)
        return tf.cast(look_up(table, rows), self.compute_dtype)


class AxesEmbedding(NotQuantized, keras.layers.Layer):
    """An `Embedding` of positions in an array: the sum of one for each of its axes.

    Args:
      axes: Sizes of the array, the last one's index of which changes fastest.
      width: Of an embedding.

    Call arguments:
      positions: int [...].

    Returns:
      [..., width], added in the dtype of the weights.
    """

    def __init__(self, axes, width, **kwargs):
        super().__init__(**kwargs)
        self.axes = tuple(axes)
        self.width = width
        deviation = (len(axes) * width) ** -0.5
        # One for each: Keras draws the same values for all that share one.
        self.initializers = [
            keras.initializers.RandomNormal(stddev=deviation) for _ in axes
        ]

    def build(self, input_shape):
        self.tables = [
            self.add_weight(
                name=f"embeddings_{axis}",
                shape=[size, self.width],
                initializer=initializer,
                autocast=False,
            )
            for axis, (size, initializer) in enumerate(
                zip(self.axes, self.initializers)
            )
        ]

    @property
    def embeddings(self):
        """[time, width]: of all positions, in order, without a look-up."""
        parts = []
        for axis, (size, table) in enumerate(zip(self.axes, self.tables)):
            shape = [1] * len(self.axes)
            shape[axis] = size
            parts.append(tf.reshape(table, [*shape, self.width]))
        return tf.reshape(self._sum(parts), [-1, self.width])

    def call(self, positions):
        parts, stride = [], math.prod(self.axes)
        for size, table in zip(self.axes, self.tables):
            stride //= size
            parts.append(tf.gather(table, positions // stride % size))
        return self._sum(parts)

    def _sum(self, parts):
        return tf.cast(functools.reduce(tf.add, parts), self.compute_dtype)


class SparseTransformerBlock(NotQuantized, keras.layers.Layer):
    """Attention and a feed-forward network, each added to what it reads.

    It is causal if the attention is.

        x = x + dropout(attention(norm_attention(x)))
        x = x + dropout(contract(expand(norm_feed_forward(x))))  # expand ends in gelu

    Args:
      attention: `SparseSelfAttention`.
      width: Width of x.
      residual_scale: Multiplies the initial weights of `contract`.
      dropout: The fraction of what is added that is dropped.
      recompute: Whether the backward pass computes the block again from its input,
        instead of keeping what it computes on the way.

    Call arguments:
      x: float [batch, time, width].
      seeds: int32 [3, 2], a seed for each of the two dropouts and for the attention's;
        None: nothing is dropped.
      segment_ids: As for the attention.

    Returns:
      Like x.
    """

    def __init__(
        self,
        attention,
        width,
        residual_scale=1.0,
        dropout=0.0,
        recompute=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self.width = width
        self.dropout = dropout
        self.recompute = recompute
        self.norm_attention = layer_norm("norm_attention", policy)
        self.attention = attention
        self.norm_feed_forward = layer_norm("norm_feed_forward", policy)
        self.expand = _dense("expand", 4 * width, 1.0, policy, gelu)
        self.contract = _dense("contract", width, residual_scale, policy)

    def build(self, input_shape):
        for layer in (
            self.norm_attention,
            self.attention,
            self.norm_feed_forward,
            self.expand,
        ):
            layer.build(input_shape)
        self.contract.build([*input_shape[:-1], 4 * self.width])

    def call(self, x, seeds=None, segment_ids=None):
        return self._residuals(x, seeds, segment_ids, recompute=self.recompute)

    @recomputable("block")
    def _residuals(self, x, seeds, segment_ids):
        h = self.attention(
            self.norm_attention(x),
            segment_ids=segment_ids,
            training=seeds is not None,
            dropout_seed=None if seeds is None else seeds[2],
        )
        x = self._add(x, h, seeds, 0)
        return self._add(x, self.feed_forward(self.norm_feed_forward(x)), seeds, 1)

    def feed_forward(self, x):
        return self.contract(self.expand(x))

    def _add(self, x, h, seeds, i):
        if seeds is not None and self.dropout:
            h = tf.nn.experimental.stateless_dropout(h, self.dropout, seeds[i])
        return x + h


def embedding(name, count, width, policy):
    return Embedding(
        count,
        width,
        embeddings_initializer=keras.initializers.RandomNormal(stddev=width**-0.5),
        dtype=policy,
        name=name,
    )


def position_embedding(time, axes, width, policy):
    name = "position_embedding"
    if axes is None:
        return embedding(name, time, width, policy)
    return AxesEmbedding(axes, width, dtype=policy, name=name)


def layer_norm(name, policy):
    return LayerNorm(epsilon=1e-5, dtype=policy, name=name)


def _dense(name, width, scale, policy, activation=None):
    return Dense(
        width,
        activation,
        kernel_initializer=normal_initializer(scale),
        dtype=policy,
        name=name,
    )


def normal_initializer(scale):
    """A normal distribution with a deviation of scale / sqrt(fan in)."""
    return keras.initializers.VarianceScaling(scale**2, "fan_in", "untruncated_normal")
