"""What the tests of flash attention share: which path ran, and a model beside its oracle."""

import collections
import contextlib

import numpy as np
import tensorflow as tf
from helpers import assert_close

from sparse_attention.keras import flash_attention

FUSED, KERAS = "fused", "keras"


@contextlib.contextmanager
def counted(**expected):
    """Fails unless so many calls take each path inside: `counted(fused=2, keras=0)`."""
    before = dict(flash_attention._calls)
    yield
    after = flash_attention._calls
    counts = {name: after[name] - before.get(name, 0) for name in (FUSED, KERAS)}
    assert counts == {FUSED: 0, KERAS: 0, **expected}


def in_policy(model, policy):
    """The same model and weights in another dtype policy."""
    config = _with_policy(model.get_config(), policy)
    clone = type(model).from_config(config)
    clone.set_weights(model.get_weights())
    return clone


def _with_policy(config, policy):
    if isinstance(config, dict):
        return {
            key: policy
            if key == "dtype" and _is_policy(value)
            else _with_policy(value, policy)
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return type(config)(_with_policy(value, policy) for value in config)
    return config


def _is_policy(value):
    """Whether a "dtype" of a config is a layer's policy, and no input's dtype."""
    return isinstance(value, dict) and "class_name" in value


def outputs_and_gradients(model, inputs, **call):
    """What a model gives, and gradients of a sum that tells its outputs apart.

    Returns:
      list of arrays: the outputs; list of arrays: the gradients, one for the weights of
      each layer.
    """

    @tf.function
    def run(inputs):
        with tf.GradientTape() as tape:
            outputs = [
                tf.convert_to_tensor(y) for y in tf.nest.flatten(model(inputs, **call))
            ]
            loss = tf.constant(0.0, tf.float64)
            for i, y in enumerate(outputs):
                y = tf.cast(y, tf.float64)
                weights = tf.math.cos(tf.cast(tf.range(tf.size(y)), tf.float64))
                loss += tf.reduce_sum(y * tf.reshape(weights, tf.shape(y))) * (i + 1)
        variables = [v.value for v in model.trainable_weights]
        return outputs, tape.gradient(
            loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )

    outputs, gradients = run(inputs)
    together = collections.defaultdict(list)
    for variable, gradient in zip(model.trainable_weights, gradients):
        # A key's bias has no gradient but rounding, so it is judged with its kernel.
        array = tf.convert_to_tensor(gradient).numpy()  # of a look-up it is rows
        together[variable.path.rpartition("/")[0]].append(array.reshape(-1))
    gradients = [np.concatenate(arrays) for arrays in together.values()]
    return [y.numpy() for y in outputs], gradients


def assert_as_close(got, oracle, plain):
    """Holds what `outputs_and_gradients` gives to the one tolerance.

    Args:
      got, oracle, plain: With the fused op; in float64 without it; in got's dtype
        without it.
    """
    for results, factor in zip(zip(got, oracle, plain), (2, 3)):
        for g, o, p in zip(*results):
            assert np.isfinite(g).all()
            assert_close(g, np.float64(o), p, factor)
