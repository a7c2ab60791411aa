"""Passes over a tensor that XLA makes one kernel of, where TensorFlow sees a GPU.

There every op by itself reads and writes all of the tensor, which in a norm takes longer
than the matrix products beside it.
"""

import functools

import tensorflow as tf

from ..ops import portable
from .backend import IS_KERAS_3, NotQuantized, keras


def compiled(function):
    """The function compiled by XLA, made when first called: old TensorFlow cannot."""

    @functools.lru_cache(maxsize=None)
    def made():
        return tf.function(function, jit_compile=True, autograph=False)

    return lambda *args: made()(*args)


def fused_on_gpu(function):
    """Compiles a function of tensors and its gradient, which keeps the arguments alone."""
    forward = compiled(function)

    @compiled
    def backward(args, dy):
        with tf.GradientTape() as tape:
            tape.watch(args)
            y = function(*args)
        return tape.gradient(y, args, dy)

    fused = tf.custom_gradient(
        lambda *args: (forward(*args), lambda dy: backward(args, dy))
    )

    @functools.wraps(function)
    def wrapper(*args):
        return fused(*args) if sees_gpu() else function(*args)

    return wrapper


def sees_gpu():
    if portable.is_on():
        return False
    return IS_KERAS_3 and bool(tf.config.get_visible_devices("GPU"))


@compiled
def _add(x, bias):
    return x + tf.cast(bias, x.dtype)


@compiled
def _sum_rows(dy):
    return tf.reduce_sum(tf.cast(dy, tf.float32), list(range(len(dy.shape) - 1)))


@tf.custom_gradient
def add_bias(x, bias):
    """x [..., width] plus bias [width], by XLA; the bias's gradient adds in float32."""
    return _add(x, bias), lambda dy: (dy, tf.cast(_sum_rows(dy), bias.dtype))


@functools.lru_cache(maxsize=None)
def biased(activation):
    """The function (x, bias) -> activation(x + bias), in the bias's dtype until the end."""
    return fused_on_gpu(
        lambda x, bias: tf.cast(activation(tf.cast(x, bias.dtype) + bias), x.dtype)
    )


class Dense(NotQuantized, keras.layers.Dense):
    """Keras's. On a GPU XLA adds the bias and applies the activation, in one function.

    TensorFlow's own op sums the gradient of a 16-bit bias with atomics in 16 bits, which
    took 35 of the 159 ms of a Sparse Transformer's step (`benchmarks/gpu_training.py`).
    """

    def add_weight(self, *args, **kwargs):
        if IS_KERAS_3 and kwargs["name"] == "bias":
            kwargs["autocast"] = False  # an op of its own; `add_bias` casts in passing
        return super().add_weight(*args, **kwargs)

    def call(self, x):
        if self.bias is None or not IS_KERAS_3:
            return super().call(x)
        y, bias = keras.ops.matmul(x, self.kernel), tf.convert_to_tensor(self.bias)
        if not sees_gpu():
            return self.activation(keras.ops.add(y, tf.cast(bias, y.dtype)))
        is_linear = self.activation is keras.activations.linear
        return (add_bias if is_linear else biased(self.activation))(y, bias)
