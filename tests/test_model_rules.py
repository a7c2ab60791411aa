"""SparseTransformer's options between q kT and the softmax."""

import itertools
import json

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_close, plain_attention_fwd
from keras_helpers import model_by_hand, normal
from rules import documents
from tf_helpers import assert_same_bits, run_script

import sparse_attention as sa
from sparse_attention.plan.reference import attention_fwd

TIME, WIDTH, LAYERS, HEADS, VOCAB, BATCH = 48, 32, 2, 4, 50, 3
SLOPES = [0.5, 0.0, -0.125, 1.0]
OPTIONS = {
    "attention_dropout": {"attention_dropout": 0.3},
    "alibi": {"alibi": SLOPES},
    "logit_softcap": {"logit_softcap": 1.5},
    "sinks": {"sinks": True},
    "relative_positions": {"relative_positions": 9},
    "rotary": {"rotary": True},
    "segment_ids": {},
}
EVERY = {name: value for option in OPTIONS.values() for name, value in option.items()}


def transformer(**options):
    keras.utils.set_random_seed(0)
    defaults = {"attention": "local,fixed", "local_attn_ctx": 16, "block_size": 8}
    model = sa.SparseTransformer(
        VOCAB, TIME, LAYERS, WIDTH, HEADS, **{**defaults, **options}
    )
    model.build([None, TIME])
    for seed, weight in enumerate(model.trainable_weights):
        if weight.name in ("sinks", "relative_bias"):  # they begin with zeros
            weight.assign(normal(*weight.shape, seed=seed))
    return model


def tokens(time=TIME, seed=0):
    print("seed", seed)
    return np.random.RandomState(seed).randint(0, VOCAB, [BATCH, time])


# ---- numbers ----


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "attention_dropout"])
@pytest.mark.parametrize("time", [TIME, 29])
def test_logits_equal_the_paper_written_out_with_each_option(name, time):
    check_logits([name], time)


def test_logits_equal_the_paper_written_out_with_all_options():
    check_logits(OPTIONS, TIME)


def check_logits(names, time):
    model = transformer(**{k: v for name in names for k, v in OPTIONS[name].items()})
    x = tokens(time)
    ids = documents(BATCH, time) if "segment_ids" in names else None
    got = model(x, segment_ids=ids).numpy()
    whole = np.pad(x, [(0, 0), (0, TIME - time)])
    rule = {
        "alibi_slopes": SLOPES if "alibi" in names else None,
        "logit_softcap": 1.5 if "logit_softcap" in names else None,
        "rotary": 10000.0 if "rotary" in names else None,
    }
    if ids is not None:
        ids = np.pad(ids, [(0, 0), (0, TIME - time)], constant_values=-1)
        rule["segment_ids"] = ids, ids
    oracle, plain = (
        model_by_hand(model, whole, dtype, attention, **rule)[:, :time]
        for dtype, attention in (
            (np.float64, attention_fwd),
            (np.float32, plain_attention_fwd),
        )
    )
    assert_close(got, oracle, plain, 2)


def test_documents_do_not_see_each_other():
    model, x = transformer(**EVERY), tokens()
    ids = np.repeat([[0, 1]], TIME // 2, axis=1) * np.ones([BATCH, 1], int)
    changed = x.copy()
    changed[:, : TIME // 2] = tokens(seed=1)[:, : TIME // 2]
    first, second = (model(a, segment_ids=ids).numpy() for a in (x, changed))
    assert_same_bits(first[:, TIME // 2 :], second[:, TIME // 2 :])
    assert (model(x) != model(changed)).numpy()[:, TIME // 2 :].any()


# ---- training ----


def gradients_of(model, x, ids):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=True, segment_ids=ids) ** 2)
    return [loss, *tape.gradient(loss, model.trainable_weights)]


@pytest.mark.parametrize("pair", list(itertools.combinations(OPTIONS, 2)), ids="-".join)
def test_each_pair_has_the_same_gradients_under_recompute(pair):
    options = {**OPTIONS[pair[0]], **OPTIONS[pair[1]]}
    ids = documents(BATCH, TIME) if "segment_ids" in pair else None
    plain, again = (
        gradients_of(transformer(recompute=r, dropout=0.1, **options), tokens(), ids)
        for r in (False, True)
    )
    assert len(plain) == len(again)
    for got, want in zip(again, plain):
        got, want = (tf.convert_to_tensor(a).numpy() for a in (got, want))
        assert_same_bits(got, want)
        assert np.abs(want).max() > 0


def fitted(dtype="float32", epochs=2, jit_compile=False, **options):
    """The losses and the weights of a fit on documents, through Keras's own inputs."""
    model = transformer(dtype=dtype, **options)
    inputs = [keras.Input([TIME], dtype="int32") for _ in "xs"]
    outer = keras.Model(inputs, model(inputs[0], segment_ids=inputs[1]))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    outer.compile(keras.optimizers.Adam(1e-2), loss, jit_compile=jit_compile)
    data, ids = tokens(), documents(BATCH, TIME)
    history = outer.fit(
        [data, ids], np.roll(data, -1, 1), epochs=epochs, batch_size=BATCH, verbose=0
    )
    return (
        history.history["loss"],
        model.get_weights(),
        outer.evaluate([data, ids], np.roll(data, -1, 1), verbose=0),
    )


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_all_train_in_mixed_precision_and_to_the_same_bits_under_recompute(dtype):
    losses, weights, _ = fitted(dtype, 8, dropout=0.1, **EVERY)
    assert losses[-1] < losses[0]
    again, same, _ = fitted(dtype, 8, dropout=0.1, recompute=True, **EVERY)
    assert losses == again
    assert_same_bits(weights, same)


def test_attention_dropout_alone_drops_in_training():
    options = {"attention_dropout": 0.5}
    losses, weights, evaluated = fitted(**options)
    again = fitted(**options)
    assert losses == again[0] and evaluated == again[2]
    assert_same_bits(weights, again[1])
    assert losses[0] != fitted()[0][0]
    model, x = transformer(**options), tokens()
    plain = transformer()
    plain.set_weights(model.get_weights())
    assert_same_bits(model(x).numpy(), plain(x).numpy())
    first, second = (model(x, training=True).numpy() for _ in range(2))
    assert (first != second).any()


def test_xla_trains_with_all_options_as_tensorflow_does():
    """The weights that are dropped are the same; sums are rounded otherwise."""
    (compiled, *_), (plain, *_) = (
        fitted(jit_compile=j, **EVERY) for j in (True, False)
    )
    np.testing.assert_allclose(compiled, plain, rtol=1e-5)


def test_the_layers_of_a_model_drop_others():
    model = transformer(attention_dropout=0.5)
    seeds = model._draw_seeds().numpy().reshape(-1, 2)
    assert len({*map(tuple, seeds)}) == 3 * LAYERS


# ---- files ----

LOAD = """
import sys
import sparse_attention as sa
import keras
import numpy as np
import tensorflow as tf
sa.load_ops()
folder = sys.argv[1] + "/"
x, ids = np.load(folder + "x.npy"), np.load(folder + "ids.npy")
loaded = keras.models.load_model(folder + "model.keras")
exported = tf.saved_model.load(folder + "exported")
results = [loaded([x, ids]), exported.serve([x, ids])]
np.save(folder + "y.npy", [y.numpy() for y in results])
"""


def test_files_give_the_same_bits_in_a_new_process(tmp_path):
    model = transformer(**EVERY)
    inputs = [keras.Input([TIME], dtype="int32") for _ in "xs"]
    outer = keras.Model(inputs, model(inputs[0], segment_ids=inputs[1]))
    x, ids = np.int32(tokens()), documents(BATCH, TIME)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "ids.npy", ids)
    outer.save(tmp_path / "model.keras")
    outer.export(str(tmp_path / "exported"), verbose=False)
    run_script(LOAD, tmp_path)
    for got in np.load(tmp_path / "y.npy"):
        assert_same_bits(got, outer([x, ids]).numpy())
    config = json.loads(json.dumps(model.get_config()))
    assert sa.SparseTransformer.from_config(config).get_config() == model.get_config()


@pytest.mark.parametrize("name", ["alibi", "logit_softcap", "sinks", "rotary"])
def test_weights_of_other_options_are_an_error(name, tmp_path):
    path = tmp_path / "model.weights.h5"
    transformer(attention_dropout=0.5).save_weights(path)
    transformer().load_weights(path)
    with pytest.raises(ValueError, match=f"{name} = (None|False) there, .* here"):
        transformer(**OPTIONS[name]).load_weights(path)


def change_config(path, change):
    """Edits the configuration beside the weights of a file; None: takes it out."""
    with h5py.File(path, "a") as file:
        group = file["vars"]
        config = json.loads(np.asarray(group["config"]).tobytes())
        del group["config"]
        if change is not None:
            group["config"] = np.frombuffer(json.dumps(change(config)).encode(), "u1")


def test_weights_from_before_the_options_load(tmp_path):
    path = tmp_path / "model.weights.h5"
    transformer().save_weights(path)
    names = [*EVERY, "kv_heads", "block_mask", "position_axes"]
    change_config(path, lambda c: {k: v for k, v in c.items() if k not in names})
    transformer().load_weights(path)
    with pytest.raises(ValueError, match="sinks = False there, True here"):
        transformer(sinks=True).load_weights(path)


def test_weights_without_a_configuration_are_an_error_that_says_so(tmp_path):
    path = tmp_path / "model.weights.h5"
    transformer().save_weights(path)
    change_config(path, None)
    with pytest.raises(ValueError, match="a SparseTransformer has saved, beside"):
        transformer().load_weights(path)


# ---- errors ----


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"attention_dropout": 1}, ValueError, "attention_dropout must be at least 0"),
        ({"alibi": [1.0]}, ValueError, "alibi must be .* each of heads=4, got"),
        ({"logit_softcap": -1}, ValueError, "logit_softcap must be positive"),
        ({"rotary": None}, TypeError, "rotary must be True, False or the base"),
    ],
)
def test_wrong_options_are_errors_at_once(options, error, message):
    with pytest.raises(error, match=message):
        transformer(**options)


def test_attention_dropout_is_no_matter_to_decoding():
    model, plain = transformer(attention_dropout=0.5), transformer()
    plain.set_weights(model.get_weights())
    got, want = (sa.generate(m, [[1, 2]], 3, temperature=0)[0] for m in (model, plain))
    np.testing.assert_array_equal(got, want)


def test_ids_of_another_length_are_an_error():
    with pytest.raises(ValueError, match=r"segment_ids must be \[batch, time\], got"):
        transformer()(tokens(), segment_ids=np.zeros([BATCH, TIME - 1], int))
