"""Adam: Keras's numbers, variables and files, by one op a variable."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_close
from tf_helpers import assert_same_bits, run_on_two_cpus

import sparse_attention as sa

STEPS = 6
SHAPES = [(40, 24), (24,), ()]
BETAS = {"beta_1": float(np.float32(0.9)), "beta_2": float(np.float32(0.999))}


def schedule():
    return keras.optimizers.schedules.CosineDecay(
        0.0, 4, warmup_target=0.01, warmup_steps=2
    )


def gradients():
    print("seed 0")
    random = np.random.RandomState(0)
    return [[random.randn(*shape) for shape in SHAPES] for _ in range(STEPS)]


def variables(dtype="float32"):
    random = np.random.RandomState(1)
    return [keras.Variable(random.randn(*shape), dtype=dtype) for shape in SHAPES]


def stepped(optimizer, weights, is_function=True):
    """The weights, then the optimizer's variables, after the steps."""
    optimizer.build(weights)

    def apply(grads):
        optimizer.apply(grads, weights)

    if is_function:
        apply = tf.function(apply)
    for grads in gradients():
        apply([tf.constant(g, w.dtype) for g, w in zip(grads, weights)])
    return [variable.numpy() for variable in weights + optimizer.variables]


# ---- numbers ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "clipnorm": 1.0},
        {"global_clipnorm": 1.0, "use_ema": True, "ema_overwrite_frequency": 2},
        {"clipvalue": 0.5, "gradient_accumulation_steps": 2},
        {"loss_scale_factor": 4.0},
    ],
)
@pytest.mark.parametrize("is_function", [False, True])
def test_steps_equal_keras(options, is_function):
    got = stepped(sa.Adam(schedule(), **options), variables(), is_function)
    oracle, plain = (
        stepped(
            keras.optimizers.Adam(schedule(), **BETAS, **options),
            variables(dtype),
            is_function,
        )
        for dtype in ("float64", "float32")
    )
    for arrays in zip(got, oracle, plain):
        if arrays[0].dtype == np.float32:
            assert_close(arrays[0], np.float64(arrays[1]), arrays[2], 3)
        else:
            assert_same_bits(arrays[0], arrays[2])


@pytest.mark.parametrize("is_function", [False, True])
@pytest.mark.parametrize(
    "options, dtype",
    [({"amsgrad": True}, "float32"), ({}, "bfloat16"), ({}, "float64")],
)
def test_keras_does_what_the_op_cannot(options, dtype, is_function):
    states = [
        stepped(Adam(0.01, **options), variables(dtype), is_function)
        for Adam in (sa.Adam, keras.optimizers.Adam)
    ]
    assert_same_bits(*states)


def test_keras_updates_by_gradients_of_rows():
    rows = tf.IndexedSlices(tf.ones([2, 24]), tf.constant([3, 5]), [40, 24])
    states = []
    for Adam in (sa.Adam, keras.optimizers.Adam):
        weights = variables()[:1]
        optimizer = Adam(0.01)
        optimizer.apply([rows], weights)
        states.append([v.numpy() for v in weights + optimizer.variables])
    assert_same_bits(*states)


class Half(sa.Adam):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, 0.5 * learning_rate)


@pytest.mark.parametrize("is_function", [False, True])
def test_a_subclass_changes_the_learning_rate(is_function):
    got = stepped(Half(0.5), variables(), is_function)
    want = stepped(sa.Adam(0.25), variables(), is_function)
    assert_same_bits(got[: len(SHAPES)], want[: len(SHAPES)])


def test_update_step_works_without_apply():
    steps = []
    for apply_by_hand in (False, True):
        optimizer, weights = sa.Adam(0.01), variables()
        optimizer.build(weights)
        for grads in gradients():
            grads = [tf.constant(g, tf.float32) for g in grads]
            if apply_by_hand:
                for grad, weight in zip(grads, weights):
                    optimizer.update_step(grad, weight, 0.01)
                optimizer.iterations.assign_add(1)
            else:
                optimizer.apply(grads, weights)
        steps.append([weight.numpy() for weight in weights])
    assert_same_bits(*steps)


# ---- ops ----


def test_a_step_has_one_op_for_each_variable():
    optimizer, weights = sa.Adam(schedule()), variables()
    optimizer.build(weights)
    grads = [tf.constant(g, tf.float32) for g in gradients()[0]]
    step = tf.function(lambda: optimizer.apply(grads, weights))
    types = [op.type for op in step.get_concrete_function().graph.get_operations()]
    assert types.count("ResourceApplyAdam") == len(SHAPES)
    assert types.count("Pow") == 2 and "Sqrt" not in types


def test_reads_stay_on_their_side_of_an_update():
    weights = variables()[:1]
    optimizer = sa.Adam(1.0)
    optimizer.build(weights)

    @tf.function
    def step():
        before = tf.convert_to_tensor(weights[0])
        optimizer.apply([tf.ones(SHAPES[0])], weights)
        return tf.reduce_mean(weights[0] - before), tf.reduce_mean(before)

    for _ in range(20):
        change, before = step()
        assert abs(change + 1) < 1e-3
    assert abs(before - np.mean(weights[0]) - 1) < 1e-3


# ---- files ----


def model(Adam, dtype="float32"):
    keras.utils.set_random_seed(0)
    made = sa.SparseTransformer(20, 32, 1, 16, 2, "all", 8, 8, dtype=dtype, name="lm")
    made.build([None, 32])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(Adam(schedule(), weight_decay=0.01, name="adam"), loss)
    made.optimizer.build(made.trainable_variables)
    return made


def fit(made, steps):
    tokens = np.random.RandomState(0).randint(0, 20, [steps, 2, 33])
    batches = tf.data.Dataset.from_tensor_slices((tokens[..., :-1], tokens[..., 1:]))
    made.fit(batches, shuffle=False, verbose=0)


def state(made):
    return [v.numpy() for v in made.variables + made.optimizer.variables]


def test_weights_of_either_load_into_the_other(tmp_path):
    path = tmp_path / "model.weights.h5"
    for source, target in (
        (sa.Adam, keras.optimizers.Adam),
        (
            keras.optimizers.Adam,
            sa.Adam,
        ),
    ):
        one, other = model(source), model(target)
        fit(one, 2)
        one.save_weights(path)
        other.load_weights(path)
        assert_same_bits(state(one), state(other))
        paths = [[v.path for v in m.optimizer.variables] for m in (one, other)]
        assert paths[0] == paths[1]
        assert one.optimizer.get_config() == other.optimizer.get_config()


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_a_run_goes_on_from_its_file_to_the_same_bits(dtype, tmp_path):
    whole, first = model(sa.Adam, dtype), model(sa.Adam, dtype)
    for made in (whole, first):
        fit(made, 3)
    first.save(tmp_path / "model.keras")
    rest = keras.models.load_model(tmp_path / "model.keras")
    assert type(rest.optimizer) is type(whole.optimizer)
    optimizer = getattr(rest.optimizer, "inner_optimizer", rest.optimizer)
    assert type(optimizer) is sa.Adam
    for made in (whole, rest):
        fit(made, 2)
    assert_same_bits(state(whole), state(rest))


# ---- several devices ----


def check_mirrored(devices):
    """Each device's copies get the bits that one device by itself gets."""
    strategy = tf.distribute.MirroredStrategy(devices)
    for wrap, rate in (
        (lambda adam: adam, schedule()),
        (keras.optimizers.LossScaleOptimizer, 0.01),
    ):
        alone = stepped(sa.Adam(rate, weight_decay=0.1), variables())
        with strategy.scope():
            weights = variables()
            adam = sa.Adam(rate, weight_decay=0.1)
            optimizer = wrap(adam)
            optimizer.build(weights)

        def replica(grads, optimizer=optimizer, weights=weights):
            half = [optimizer.scale_loss(grad) / len(devices) for grad in grads]
            optimizer.apply(half, weights)

        step = tf.function(lambda grads, run=replica: strategy.run(run, (grads,)))
        for grads in gradients():
            step([tf.constant(grad, tf.float32) for grad in grads])
        for want, variable in zip(alone, weights + adam.variables):
            for copy in strategy.experimental_local_results(variable.value):
                assert_same_bits(copy.numpy(), want)


def test_two_devices_update_their_copies():
    run_on_two_cpus(
        "import test_optimizer\ntest_optimizer.check_mirrored(['CPU:0', 'CPU:1'])"
    )
