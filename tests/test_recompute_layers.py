"""recomputable around Keras 3's layers that draw random numbers or change what they hold."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import sparse_attention as sa

GLOBAL = keras.layers.Dropout(0.5, seed=1)
X = np.random.RandomState(0).normal(size=[64, 8]).astype(np.float32)  # seed 0


def result_and_gradient(function, mode, x=X):
    """y and dy^2 / dx of `function(x)`."""

    def both(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
            loss = tf.reduce_sum(y * y)
        return y, tape.gradient(loss, x)

    return (tf.function(both) if mode == "function" else both)(tf.constant(x))


def layers_of(way):
    """A recomputable function of x with a Dropout in it, which is reached in some way."""
    dropout = keras.layers.Dropout(0.5, seed=1)
    model = keras.Sequential([keras.layers.Dropout(0.5, seed=1)])
    generator = keras.random.SeedGenerator(1)

    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.Dropout(0.5, seed=1)

        @sa.recomputable
        def call(self, x):
            return self.inner(x, training=True)

    block = Block()
    functions = {
        "closure": lambda x: dropout(x, training=True),
        "global": lambda x: GLOBAL(x, training=True),
        "argument": lambda x, layer=dropout: layer(x, training=True),
        "model": lambda x: model(x, training=True),
        "generator": lambda x: keras.random.dropout(x, 0.5, seed=generator),
    }
    if way == "method":
        return lambda x, recompute: block.call(x, recompute=recompute)
    return sa.recomputable(functions[way])


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize(
    "way", ["closure", "global", "argument", "model", "generator", "method"]
)
def test_dropout_draws_the_same_mask_again(way, mode):
    layer = layers_of(way)
    masks = []
    step = lambda x: layer(x, recompute=True)  # noqa: E731
    for _ in range(2):
        y, dx = result_and_gradient(step, mode)
        np.testing.assert_allclose(dx, 4 * y, rtol=1e-6)  # dy / dx is 2 or 0
        masks.append(y.numpy() != 0)
    assert 0.3 < masks[0].mean() < 0.7


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_seeds_go_on_by_one_a_call(mode):
    dropout = keras.layers.Dropout(0.5, seed=1)
    layer = sa.recomputable(lambda x: dropout(x, training=True))

    def stack(x):
        return layer(layer(x, recompute=True) + 1, recompute=True)

    plain = keras.layers.Dropout(0.5, seed=1)
    for _ in range(3):
        y, dx = result_and_gradient(stack, mode)
        want, dwant = result_and_gradient(
            lambda x: plain(plain(x, training=True) + 1, training=True), mode
        )
        np.testing.assert_array_equal(y, want)
        np.testing.assert_array_equal(dx, dwant)
    state, wanted = (d.seed_generator.state for d in (dropout, plain))
    np.testing.assert_array_equal(state, wanted)


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("is_built", [True, False])
def test_moving_averages_are_updated_once(is_built, mode):
    layer, plain = (keras.layers.BatchNormalization(momentum=0.5) for _ in range(2))
    if is_built or mode == "function":
        layer.build(X.shape), plain.build(X.shape)
    again = sa.recomputable(lambda x: layer(x, training=True))
    y, dx = result_and_gradient(lambda x: again(x, recompute=True), mode)
    want, dwant = result_and_gradient(lambda x: plain(x, training=True), mode)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(dx, dwant)
    assert np.abs(layer.moving_mean.numpy()).max() > 0
    for got, expected in zip(layer.variables, plain.variables):
        np.testing.assert_array_equal(got.numpy(), expected.numpy())


def test_recompute_inside_of_recompute_draws_and_updates_once():
    dropout = keras.layers.Dropout(0.5, seed=1)
    norm = keras.layers.BatchNormalization(momentum=0.5)
    norm.build(X.shape)
    inner = sa.recomputable(lambda x: dropout(norm(x, training=True), training=True))
    outer = sa.recomputable(lambda x: inner(x, recompute=True) * 3.0)
    y, dx = result_and_gradient(lambda x: outer(x, recompute=True), "eager")
    plain = keras.layers.Dropout(0.5, seed=1)
    same = keras.layers.BatchNormalization(momentum=0.5)
    want, dwant = result_and_gradient(
        lambda x: plain(same(x, training=True), training=True) * 3.0, "eager"
    )
    np.testing.assert_array_equal(y, want)
    np.testing.assert_allclose(dx, dwant, rtol=1e-5, atol=1e-6)
    for got, expected in zip(norm.variables, same.variables):
        np.testing.assert_array_equal(got.numpy(), expected.numpy())


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_state_that_is_not_found_is_an_error(mode):
    keras.utils.set_random_seed(0)
    function = sa.recomputable(lambda x: keras.random.dropout(x, 0.5))
    with pytest.raises(ValueError, match="pass the layer or the SeedGenerator"):
        result_and_gradient(lambda x: function(x, recompute=True), mode)


def test_fit_with_dropout_and_batch_norm_trains_as_without_recompute():
    class Block(keras.layers.Layer):
        def __init__(self, recompute):
            super().__init__()
            self.recompute = recompute
            self.norm = keras.layers.BatchNormalization()
            self.dropout = keras.layers.Dropout(0.3, seed=3)
            self.dense = keras.layers.Dense(8, kernel_initializer="ones")

        def build(self, shape):
            for layer in self.norm, self.dropout, self.dense:
                layer.build(shape)

        def call(self, x, training=False):
            return self.run(x, training, recompute=self.recompute)

        @sa.recomputable
        def run(self, x, training):
            x = self.dropout(self.norm(x, training=training), training=training)
            return self.dense(x)

    def weights(recompute):
        model = keras.Sequential([keras.Input([8]), Block(recompute), Block(recompute)])
        model.compile("sgd", "mse", jit_compile=False)
        model.fit(X, X, epochs=2, batch_size=16, shuffle=False, verbose=0)
        return model.get_weights()

    for a, b in zip(weights(True), weights(False)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
