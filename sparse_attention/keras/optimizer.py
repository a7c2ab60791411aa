"""Adam as one op a variable, of which Keras makes about twenty."""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf

from .backend import keras, require_keras_3
from .layers import serializable


@serializable
class Adam(keras.optimizers.Adam):
    """Keras's Adam, which updates each variable by TensorFlow's one op for it.

        model.compile(sa.Adam(5e-4), loss)

    A GPU launches a kernel for each of Keras's ops, and of a small variable the launches
    take longer than the update. Variables, names and config are Keras's: files of either
    load into the other. Keras still decays and averages weights, clips gradients and
    scales losses, and alone updates what the op cannot: with `amsgrad`, a variable that
    is not float32, or by a gradient of some rows (`tf.IndexedSlices`).

    Args:
      *args: As for `keras.optimizers.Adam`.
      **kwargs: The same.

    Raises:
      ImportError: If Keras is older than 3.

    Numerics: Keras's formula in float32, but 1 - beta_2 is taken there, too: for 0.999
      it is 1.3e-5 of itself below 0.001, and an update up to 7e-6 of itself off Keras's.
      Bitwise deterministic: each element is updated by itself.

    Reference: Kingma and Ba 2014, "Adam: A Method for Stochastic Optimization",
      arXiv:1412.6980.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require_keras_3("Adam")
        super().__init__(*args, **kwargs)
        self._shared_powers: Any = None

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        # While it runs, the variables of a device share one power of each beta.
        self._shared_powers = functools.lru_cache(maxsize=None)(
            lambda graph, device: self._powers()
        )
        try:
            return super().apply(grads, trainable_variables)
        finally:
            self._shared_powers = None

    def _powers(self):
        step = tf.cast(self.iterations + 1, tf.float32)
        return self.beta_1**step, self.beta_2**step

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        is_sparse = isinstance(gradient, tf.IndexedSlices)
        if self.amsgrad or is_sparse or variable.dtype != tf.float32:
            return super().update_step(gradient, variable, learning_rate)
        if self._shared_powers is None:
            beta1_power, beta2_power = self._powers()
        else:
            graph = tf.compat.v1.get_default_graph()
            device = variable.handle.device
            beta1_power, beta2_power = self._shared_powers(graph, device)
        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=beta1_power,
            beta2_power=beta2_power,
            lr=tf.cast(learning_rate, tf.float32),
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=tf.cast(gradient, tf.float32),
            # The op takes the locks of resource variables in any case.
            use_locking=False,
        )
