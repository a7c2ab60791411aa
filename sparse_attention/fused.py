"""Passes over a tensor that XLA makes one kernel of, where TensorFlow sees a GPU.

There every op by itself reads and writes all of the tensor, which in a norm takes longer
than the matrix products beside it.
"""

import functools

import tensorflow as tf

from ._keras import IS_KERAS_3, keras


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
    return IS_KERAS_3 and bool(tf.config.get_visible_devices("GPU"))


_add = compiled(lambda x, bias: x + bias)


@compiled
def _sum_rows(dy):
    sums = tf.reduce_sum(tf.cast(dy, tf.float32), list(range(len(dy.shape) - 1)))
    return tf.cast(sums, dy.dtype)


@tf.custom_gradient
def add_bias(x, bias):
    """x [..., width] plus bias [width], by XLA; the bias's gradient adds in float32."""
    return _add(x, bias), lambda dy: (dy, _sum_rows(dy))


class Dense(keras.layers.Dense):
    """Keras's without activation. On a GPU it adds the bias by `add_bias`.

    TensorFlow's own op sums the gradient of a 16-bit bias with atomics in 16 bits, which
    took 35 of the 159 ms of a Sparse Transformer's step (`benchmarks/gpu_training.py`).
    """

    def call(self, x):
        if self.bias is None or not sees_gpu():
            return super().call(x)
        bias = tf.convert_to_tensor(self.bias)
        return add_bias(keras.ops.matmul(x, self.kernel), bias)
