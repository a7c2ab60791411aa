"""What models do with positions besides learning a vector for each: rotary, ALiBi."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from ..plan.checks import check_positive
from .attention import not_converted
from .signature import TensorLike

ROTARY_BASE = 10000.0


def alibi_slopes(heads: int) -> np.ndarray:
    """The slopes of attention with linear biases, one for each head.

    They are 2 ** (-8 h / heads), h = 1 ... heads, where heads is a power of two. Of other
    numbers of heads, the first have the slopes of the power of two below, and the rest
    every second one of the power of two above.

    >>> alibi_slopes(4)
    array([0.25      , 0.0625    , 0.015625  , 0.00390625], dtype=float32)
    >>> alibi_slopes(3)
    array([0.0625    , 0.00390625, 0.25      ], dtype=float32)

    Args:
      heads: Number of query heads.

    Returns:
      float32 [heads], for `alibi_slopes` of `block_sparse_attention`.

    Raises:
      ValueError: If `heads` is not a positive integer.

    Reference: Press et al. 2021, "Train Short, Test Long: Attention with Linear Biases
      Enables Input Length Extrapolation", arXiv:2108.12409, section 3.
    """
    check_positive(heads=heads)
    below = 1 << (int(heads).bit_length() - 1)
    of_below, of_above = (
        2.0 ** (-8.0 * np.arange(1, n + 1) / n) for n in (below, 2 * below)
    )
    slopes = np.concatenate([of_below, of_above[::2][: heads - below]])
    return slopes.astype(np.float32)


@not_converted
def rotary_embedding(
    x: TensorLike,
    heads: int,
    positions: TensorLike | None = None,
    base: float = ROTARY_BASE,
) -> Any:
    """Turns the queries or the keys by their positions, so that scores tell distances.

    The elements i and i + head_dim / 2 of a head are a pair, i < head_dim / 2:

        angle  = position * base ** (-2 i / head_dim)
        y_i    = x_i cos(angle) - x_(i + head_dim / 2) sin(angle)
        y_(i + head_dim / 2) = x_(i + head_dim / 2) cos(angle) + x_i sin(angle)

    The score of a query and a key, both turned, depends on their contents and on the
    difference of their positions alone.

    >>> x = tf.ones([2, 128, 4 * 16])
    >>> rotary_embedding(x, heads=4).shape.as_list()
    [2, 128, 64]

    Args:
      x: float32, float16 or bfloat16 [batch, time, heads * head_dim]; head_dim is even.
      heads: Number of heads of x, for keys that of kv heads.
      positions: int [time] or [batch, time]; None: 0 ... time - 1.
      base: The longest wave has nearly 2 pi * base positions.

    Returns:
      Like x.

    Raises:
      TypeError: If a dtype is not supported.
      ValueError: If a shape does not fit, or `base` is not positive.

    Numerics: Angles in float64, which tells positions apart at any length; the rest in
      float32, rounded to the dtype of x at the end.

    Reference: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position
      Embedding", arXiv:2104.09864; the pairs are those of GPT-NeoX and Llama.
    """
    x = tf.convert_to_tensor(x, name="x")
    check_positive(heads=heads)
    if x.dtype not in (tf.float32, tf.float16, tf.bfloat16):
        raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype.name}")
    width = x.shape.as_list()[2] if x.shape.rank == 3 else None
    if width is None or width % (2 * heads):
        raise ValueError(
            f"x must be [batch, time, heads={heads} * head_dim], where head_dim is even, "
            f"got shape {x.shape}"
        )
    if not base > 0:
        raise ValueError(f"base must be positive, got {base!r}")
    batch, time, _ = tf.unstack(tf.shape(x))
    pairs = width // (2 * heads)
    if positions is None:
        positions = tf.range(time)
    positions = tf.convert_to_tensor(positions, name="positions")
    if not positions.dtype.is_integer:
        raise TypeError(f"positions must be integers, got {positions.dtype.name}")
    shapes = x.shape[1:2], x.shape[:2]
    if not any(positions.shape.is_compatible_with(shape) for shape in shapes):
        raise ValueError(
            f"positions must be [time] or [batch, time] of x {x.shape}, got shape "
            f"{positions.shape}"
        )
    waves = float(base) ** (-np.arange(pairs) / pairs)
    angles = tf.cast(positions, tf.float64)[..., None, None] * waves
    cos, sin = (tf.cast(f(angles), tf.float32) for f in (tf.cos, tf.sin))
    halves = tf.reshape(x, [batch, time, heads, 2, pairs])
    a, b = tf.unstack(tf.cast(halves, tf.float32), axis=3)
    turned = tf.stack([a * cos - b * sin, b * cos + a * sin], axis=3)
    y = tf.cast(tf.reshape(turned, tf.shape(x)), x.dtype)
    y.set_shape(x.shape)
    return y
