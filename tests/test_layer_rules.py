"""SparseSelfAttention's options between q kT and the softmax, on Keras 3 and Keras 2."""

import json
import random

import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_close
from keras_helpers import (
    functional,
    gradients_by_fit,
    layer_by_hand,
    normal,
    weights_of,
)
from rules import documents, random_mask
from tensorflow import keras
from tf_helpers import assert_same_bits

import sparse_attention as sa

TIME, WIDTH, HEADS, BATCH = 40, 32, 4, 3
PATTERNS = {
    "all": {},
    "local": {"local_attn_ctx": 16},
    "strided": {"local_attn_ctx": 5},
    "fixed": {"local_attn_ctx": 16, "num_verts": 2},
}
IS_TENSORFLOW_1 = tf.__version__.startswith("1.")


def attention(attn_mode="local", **options):
    options = {"block_size": 8, **PATTERNS[attn_mode], **options}
    return sa.SparseSelfAttention(HEADS, attn_mode=attn_mode, **options)


# ---- numbers ----

SLOPES = [0.5, 0.0, -0.125, 1.0]
SEED = [7, 1 << 20]
# name: options of the layer, and what they are for the reference; a weight is None there.
OPTIONS = {
    "dropout": ({"dropout": 0.3}, {"dropout_rate": 0.3, "dropout_seed": SEED}),
    "alibi": ({"alibi": True}, {"alibi_slopes": [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]}),
    "slopes": ({"alibi": np.float32(SLOPES)}, {"alibi_slopes": SLOPES}),
    "logit_softcap": ({"logit_softcap": 1.5}, {"logit_softcap": 1.5}),
    "sinks": ({"sinks": True}, {"sinks": None}),
    "relative_positions": ({"relative_positions": 9}, {"relative_bias": None}),
    "rotary": ({"rotary": True}, {"rotary": 10000.0}),
    "rotary_base": ({"rotary": 50}, {"rotary": 50.0}),
}


def inputs_of(time):
    """What the layer is called with, and what the reference is, for each kind."""
    ids = documents(BATCH, time)
    is_token = np.random.RandomState(4).rand(BATCH, time) < 0.7
    is_token[1, : time // 2] = False  # padding on the left
    pairs = random_mask(BATCH, HEADS, time, time)
    by_query = random_mask(BATCH, time, 1)
    return {
        "segment_ids": ({"segment_ids": ids}, {"segment_ids": (ids, ids)}),
        "mask": ({"mask": is_token}, {"mask": is_token[:, None, None]}),
        "attention_mask": ({"attention_mask": pairs}, {"mask": pairs}),
        "by_query": ({"attention_mask": by_query}, {"mask": by_query[:, None]}),
    }


def check(names, attn_mode="local", time=TIME, is_known=True, kv_heads=HEADS):
    """Output and gradients of a step of fit, against the float64 oracle."""
    options, rule, called = {}, {}, {}
    for name in names:
        if name in OPTIONS:
            options.update(OPTIONS[name][0])
            rule.update(OPTIONS[name][1])
        else:
            given, by_hand = inputs_of(time)[name]
            called.update(given)
            mask = rule.get("mask", True) & by_hand.get("mask", np.bool_(True))
            rule.update(by_hand)
            if "mask" in by_hand:
                rule["mask"] = mask
    layer, twin = (attention(attn_mode, kv_heads=kv_heads, **options) for _ in "ab")
    functional(layer, TIME, WIDTH)
    functional(twin, time, WIDTH)
    twin.set_weights(layer.get_weights())
    found = weights_of(layer)[4:]
    trained = [name for name in ("relative_bias", "sinks") if name in rule]
    rule.update(zip(trained, found))
    assert len(found) == len(trained)

    shape = time if is_known else None
    x_input = keras.Input([shape, WIDTH])
    others = [
        keras.Input(
            [shape if n == time else n for n in a.shape[1:]], dtype=a.dtype.name
        )
        for a in called.values()
    ]
    constants = {"training": True, "dropout_seed": SEED} if "dropout" in names else {}
    y = layer(x_input, **dict(zip(called, others)), **constants)
    # Lambda keeps the mask from the loss, out of which Keras would leave the padding.
    model = keras.Model([x_input, *others], keras.layers.Lambda(lambda y: 1.0 * y)(y))
    x, target = normal(BATCH, time, WIDTH, seed=8), normal(BATCH, time, WIDTH, seed=9)
    oracle, plain = (
        layer_by_hand(twin, x, target, dtype, **rule)
        for dtype in ("float64", "float32")
    )
    arrays = [x, *called.values()]
    if IS_TENSORFLOW_1:
        y = model.predict(arrays)
    else:  # Keras 3's predict is never in training
        y = model([tf.constant(a) for a in arrays], training=True).numpy()
    assert_close(y, oracle[0], plain[0], 2)
    got = gradients_by_fit(model, layer, arrays, target)
    for g, want, by_hand in zip(got[:4], oracle[1:5], plain[1:5]):
        assert_close(g, want, by_hand, 3)
    assert len(got) == len(oracle) - 1
    for g, want, (by_hand, sizes) in zip(got[4:], oracle[5:], plain[5:]):
        assert_close(g, want, by_hand, 3, sizes)


@pytest.mark.parametrize("name", [*OPTIONS, *inputs_of(TIME)])
def test_each_equals_the_oracle(name):
    check([name])


ALL = [n for n in (*OPTIONS, *inputs_of(TIME)) if n not in ("slopes", "rotary_base")]
CALLS = [("all", TIME, True), ("strided", 25, False), ("fixed", 25, True)]


@pytest.mark.parametrize("attn_mode, time, is_known", CALLS)
def test_all_together_equal_the_oracle(attn_mode, time, is_known):
    names = [name for name in ALL if name != "by_query"]
    check(names, attn_mode, time, is_known, kv_heads=2)


def test_a_policy_of_16_bits_keeps_what_is_added_to_scores_in_float32():
    policy = "mixed_bfloat16"
    if IS_TENSORFLOW_1:
        policy = keras.mixed_precision.experimental.Policy("mixed_float16")
    layer = attention(sinks=True, relative_positions=9, dtype=policy)
    layer.build([None, TIME, WIDTH])
    x = tf.zeros([1, TIME, WIDTH], tf.float16 if IS_TENSORFLOW_1 else tf.float32)
    layer.set_weights([np.full(w.shape, 1 + 2.0**-20) for w in layer.get_weights()])
    seen = {}

    def spy(q, k, v, *args, **rule):
        for name in ("sinks", "relative_bias"):  # here Keras would cast them
            seen[name] = tf.convert_to_tensor(rule[name]).dtype
        return v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse_attention.keras.layers.block_sparse_attention", spy)
        layer(x)
    assert seen == {"sinks": tf.float32, "relative_bias": tf.float32}


# ---- dropout ----


def steps_of(layer, steps, training=True, again=False):
    """What a graph of the layer gives in each step.

    The gradients of its outputs are taken under `recomputable`, if `again`.
    """
    x = normal(BATCH, TIME, WIDTH)

    def step(x):
        call = sa.recomputable(lambda x: layer(x, training=training))
        if IS_TENSORFLOW_1:
            y = call(x, recompute=again)
            return y, tf.gradients(y, x)[0]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x, recompute=again)
        return y, tape.gradient(y, x)

    if not IS_TENSORFLOW_1:
        run = tf.function(step)
        return [[a.numpy() for a in run(tf.constant(x))] for _ in range(steps)]
    results = step(tf.constant(x))
    session = keras.backend.get_session()
    return [session.run(results) for _ in range(steps)]


def dropping(**options):
    """A layer made after all seeds have been set, whose weights do not depend on them."""
    keras.backend.clear_session()
    if IS_TENSORFLOW_1:
        random.seed(3)
        tf.compat.v1.set_random_seed(3)
    else:
        keras.utils.set_random_seed(3)
    layer = attention("all", dropout=0.5, **options)
    functional(layer, TIME, WIDTH)
    return layer


@pytest.mark.parametrize("options", [{}, {"seed": 5}])
def test_each_step_drops_others_and_set_random_seed_repeats_them(options):
    first, second = steps_of(dropping(**options), 2)
    assert (first[0] != second[0]).any()
    for a, b in zip(steps_of(dropping(**options), 2), (first, second)):
        assert_same_bits(a[0], b[0])
    other = steps_of(dropping(seed=6), 1)
    assert (other[0][0] != first[0]).any()


def test_two_layers_drop_others():
    first = dropping()
    x = functional(attention("all", dropout=0.5), TIME, WIDTH).layers[-1]
    assert (steps_of(first, 1)[0][0] != steps_of(x, 1)[0][0]).any()


@pytest.mark.parametrize("training", [False, None])
def test_nothing_is_dropped_but_in_training(training):
    layer = dropping()
    plain = attention("all")
    functional(plain, TIME, WIDTH)
    got, want = (steps_of(x, 1, training=training)[0] for x in (layer, plain))
    assert_same_bits(got[0], want[0])


def test_recompute_drops_the_same_again():
    plain, again = (steps_of(dropping(), 2, again=a) for a in (False, True))
    for (y, dx), (want_y, want_dx) in zip(again, plain):
        assert_same_bits(y, want_y)
        np.testing.assert_allclose(dx, want_dx, atol=1e-5)  # sums in another order


def test_fit_drops_and_predict_does_not():
    layer, plain = dropping(), attention("all")
    models = [functional(x, TIME, WIDTH) for x in (layer, plain)]
    x = normal(BATCH, TIME, WIDTH)
    assert_same_bits(*(model.predict(x) for model in models))
    losses = []
    for model in models:
        model.compile(keras.optimizers.SGD(0.0), "mse")
        losses.append(model.fit(x, x, epochs=2, verbose=0).history["loss"])
        losses.append(model.evaluate(x, x, verbose=0))
    dropped, evaluated, whole, same = losses
    assert len({*dropped, whole[0]}) == 3 and evaluated == same


# ---- configuration ----

CONFIGURED = {
    "dropout": np.float32(0.25),
    "seed": 3,
    "alibi": np.float32(SLOPES),
    "logit_softcap": np.int64(30),
    "sinks": np.bool_(True),
    "relative_positions": np.int64(9),
    "rotary": 500,
}


def test_config_makes_the_same_layer_again():
    layer = attention(**CONFIGURED)
    model = functional(layer, TIME, WIDTH)
    config = json.loads(json.dumps(layer.get_config()))
    assert {name: config[name] for name in CONFIGURED} == {
        "dropout": 0.25,
        "seed": 3,
        "alibi": SLOPES,
        "logit_softcap": 30.0,
        "sinks": True,
        "relative_positions": 9,
        "rotary": 500.0,
    }
    again = sa.SparseSelfAttention.from_config(config)
    assert again.get_config() == layer.get_config()
    other = functional(again, TIME, WIDTH)
    x = normal(1, TIME, WIDTH)
    assert_same_bits(model.predict(x), other.predict(x))


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_a_file_gives_the_same_bits(suffix, tmp_path):
    if suffix == ".keras" and IS_TENSORFLOW_1:
        suffix = ".hdf5"  # it knows no other
    model = functional(attention(**CONFIGURED), TIME, WIDTH)
    path = str(tmp_path / "model") + suffix
    model.save(path)
    loaded = keras.models.load_model(path)
    x = normal(2, TIME, WIDTH)
    assert_same_bits(loaded.predict(x), model.predict(x))
    assert loaded.layers[-1].get_config() == model.layers[-1].get_config()


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"dropout": 1.0},
            ValueError,
            "dropout must be at least 0 and below 1, got 1.0",
        ),
        ({"dropout": None}, TypeError, "dropout must be a number, got None"),
        ({"alibi": [1.0, 2.0]}, ValueError, "alibi must be .* each of heads=4, got"),
        ({"alibi": None}, ValueError, "alibi must be True, False .* got None"),
        ({"alibi": "yes"}, ValueError, "alibi must be .* got 'yes'"),
        ({"alibi": [np.inf] * 4}, ValueError, "alibi must be .* finite slope"),
        ({"logit_softcap": 0}, ValueError, "logit_softcap must be positive .* got 0"),
        ({"logit_softcap": True}, TypeError, "logit_softcap must be a number or None"),
        ({"sinks": 1}, TypeError, "sinks must be True or False, got 1"),
        (
            {"relative_positions": 0},
            ValueError,
            "relative_positions must be a positive",
        ),
        ({"relative_positions": 2.0}, ValueError, "relative_positions must be a posit"),
        ({"rotary": -1.0}, ValueError, "rotary must be positive and finite, got -1.0"),
        ({"rotary": "llama"}, TypeError, "rotary must be True, False or the base"),
        ({"seed": 0.5}, ValueError, "seed must be an integer, got 0.5"),
    ],
)
def test_wrong_options_are_errors_at_once(options, error, message):
    with pytest.raises(error, match=message):
        attention(**options)
