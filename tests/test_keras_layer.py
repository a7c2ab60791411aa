"""SparseSelfAttention, on Keras 3 and on TensorFlow 1's Keras 2."""

import json

import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_close
from keras_helpers import functional, gradients_by_fit, layer_by_hand, normal
from tensorflow import keras
from tf_helpers import assert_same_bits, run_script

import sparse_attention as sa

TIME, WIDTH = 40, 32
PATTERNS = {
    "all": {},
    "local": {"local_attn_ctx": 16},
    "strided": {"local_attn_ctx": 5},
    "fixed": {"local_attn_ctx": 16, "num_verts": 2},
}


def attention(attn_mode="local", heads=4, **options):
    options = {"block_size": 8, **PATTERNS[attn_mode], **options}
    return sa.SparseSelfAttention(heads, attn_mode=attn_mode, **options)


def everyone(heads=1):
    """A plan in which padding matters: every query attends to every key."""
    return sa.BlockMask(sa.dense_layout(TIME, 8, heads=heads), None, 8, TIME, TIME)


# ---- numbers ----


# A pattern, the time of x, and whether it is known before the graph runs.
CALLS = [(name, *call) for name in PATTERNS for call in [(TIME, True), (25, False)]]
CALLS += [("local", TIME, False), ("local", 25, True), ("local", 1, False)]
KV_HEADS = {"all": 4, "local": 2, "strided": 1, "fixed": 4}


@pytest.mark.parametrize("attn_mode, time, is_known", CALLS)
def test_a_step_of_fit_equals_the_oracle(attn_mode, time, is_known):
    """To a shorter x a layer does what one does that is built for its time."""
    kv_heads = KV_HEADS[attn_mode]
    layer, twin = (attention(attn_mode, kv_heads=kv_heads) for _ in "ab")
    functional(layer, TIME, WIDTH)
    functional(twin, time, WIDTH)
    twin.set_weights(layer.get_weights())
    inputs = keras.Input([time if is_known else None, WIDTH])
    model = keras.Model(inputs, layer(inputs))
    x, target = normal(3, time, WIDTH, seed=8), normal(3, time, WIDTH, seed=9)
    oracle = layer_by_hand(twin, x, target, "float64")
    plain = layer_by_hand(twin, x, target, "float32")
    assert_close(model.predict(x), oracle[0], plain[0], 2)
    steps = gradients_by_fit(model, layer, x, target)
    for got, want, by_hand in zip(steps, oracle[1:], plain[1:]):
        assert_close(got, want, by_hand, 3)


def test_projections_start_with_values_of_their_own():
    layer = attention(kernel_initializer=keras.initializers.RandomNormal())
    layer.build([None, TIME, WIDTH])
    query, _, key, _, value, _, _, _ = layer.get_weights()
    assert not (query == key).any() and not (query == value).any()


# ---- padding ----


@pytest.mark.parametrize("plan", ["local", "everyone"])
def test_padding_equals_the_oracle_and_is_never_read(plan):
    options = {"block_mask": everyone()} if plan == "everyone" else {"attn_mode": plan}
    layer = sa.SparseSelfAttention(
        4, block_size=8, **{**options, **PATTERNS.get(plan, {})}
    )
    functional(layer, TIME, WIDTH)
    lengths = np.array([TIME, 17, 0], np.int32)
    x, is_token = normal(3, TIME, WIDTH), np.arange(TIME) < lengths[:, None]
    inputs = keras.Input([TIME, WIDTH]), keras.Input([TIME], dtype="bool")
    model = keras.Model(inputs, layer(inputs[0], mask=inputs[1]))
    got = model.predict([x, is_token])
    oracle, plain = (
        layer_by_hand(layer, x, np.zeros_like(x), dtype, lengths)[0]
        for dtype in ("float64", "float32")
    )
    assert_close(got, oracle, plain, 2)
    poisoned = np.where(is_token[..., None], x, np.float32(1e6))
    again = model.predict([poisoned, is_token])
    assert_same_bits(got[is_token], again[is_token])


def padded_model():
    """Tokens, 0 = padding -> attention to every token -> the mean over the tokens."""
    tokens = keras.Input([TIME])
    x = keras.layers.Embedding(8, WIDTH, mask_zero=True)(tokens)
    x = sa.SparseSelfAttention(4, block_mask=everyone())(x)
    return keras.Model(tokens, keras.layers.GlobalAveragePooling1D()(x))


def test_keras_hands_the_mask_in_and_on():
    model = padded_model()
    tokens = np.random.RandomState(0).randint(1, 8, [2, TIME])
    tokens[1, 10:] = 0
    embedding, attention_layer = model.layers[1:3]
    x = embedding.get_weights()[0][tokens]
    y = layer_by_hand(attention_layer, x, x, "float32", [TIME, 10])[0]
    means = np.stack([y[0].mean(axis=0), y[1, :10].mean(axis=0)])
    y64 = layer_by_hand(attention_layer, x, x, "float64", [TIME, 10])[0]
    means64 = np.stack([y64[0].mean(axis=0), y64[1, :10].mean(axis=0)])
    assert_close(model.predict(tokens), means64, means, 2)


@pytest.mark.parametrize(
    "name, shape, dtype, error",
    [
        ("mask", [2, TIME, TIME], "bool", r"mask must be \[batch, time\], got shape"),
        ("mask", [2, TIME], "int32", "mask must be bool, True = a token, got int32"),
        ("segment_ids", [2, TIME + 1], "int32", r"segment_ids must be \[batch, time\]"),
        (
            "segment_ids",
            [2, TIME],
            "float32",
            "segment_ids must be integers, got float",
        ),
        (
            "attention_mask",
            [2, TIME],
            "bool",
            "attention_mask must be bool .* got bool",
        ),
        ("attention_mask", [2, TIME, 2], "bool", "where the time is 40"),
        (
            "attention_mask",
            [2, TIME, TIME],
            "int32",
            "attention_mask must be bool .* int",
        ),
    ],
)
def test_masks_and_ids_of_another_kind_are_errors(name, shape, dtype, error):
    layer = attention()
    with pytest.raises((ValueError, TypeError), match=error):
        layer(tf.zeros([2, TIME, WIDTH]), **{name: tf.zeros(shape, dtype)})


# ---- configuration ----


def test_config_makes_the_same_layer_again():
    layer = attention("fixed", head_dim=16, kv_heads=2, use_bias=False, name="a")
    model = functional(layer, TIME, WIDTH)
    config = json.loads(json.dumps(layer.get_config()))
    again = sa.SparseSelfAttention.from_config(config)
    assert again.get_config() == layer.get_config()
    other = functional(again, TIME, WIDTH)
    x = normal(1, TIME, WIDTH)
    assert_same_bits(model.predict(x), other.predict(x))


def test_numpys_integers_are_configured_as_pythons():
    sizes = {"heads": 4, "head_dim": 8, "kv_heads": 2, "block_size": 8}
    sizes.update(local_attn_ctx=16, num_verts=2, vertsize=1)
    layer, wide = (
        sa.SparseSelfAttention(
            attn_mode="fixed", name="a", **{k: dtype(n) for k, n in sizes.items()}
        )
        for dtype in (int, np.int64)
    )
    wide.build([None, TIME, WIDTH])
    config = json.loads(json.dumps(wide.get_config()))
    assert config == json.loads(json.dumps(layer.get_config()))


def test_config_holds_a_block_mask_of_the_user():
    mask = sa.BlockMask(
        np.random.RandomState(0).random_sample([4, 6, 6]) < 0.5,
        lambda head, q_idx, kv_idx: (3 * q_idx + kv_idx + head) % 5 > 1,
        block_size=8,
        q_len=TIME,
        kv_len=TIME,
        row_stride=12,
    )
    layer = sa.SparseSelfAttention(4, block_mask=mask)
    model = functional(layer, TIME, WIDTH)
    config = json.loads(json.dumps(layer.get_config()))
    other = functional(sa.SparseSelfAttention.from_config(config), TIME, WIDTH)
    x = normal(1, TIME, WIDTH)
    assert_same_bits(model.predict(x), other.predict(x))


LOAD = """
import importlib
import sys
for module in sys.argv[4:]:
    importlib.import_module(module)
import numpy as np
from tensorflow import keras
model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[3], model.predict(np.load(sys.argv[2])))
"""


@pytest.mark.parametrize(
    "imports",
    [("sparse_attention", "tensorflow"), ("tensorflow", "sparse_attention")],
)
def test_saved_model_gives_the_same_bits_in_a_new_process(imports, tmp_path):
    model = functional(sa.SparseSelfAttention(4, block_mask=everyone()), TIME, WIDTH)
    x = normal(2, TIME, WIDTH)
    paths = [str(tmp_path / name) for name in ("model.h5", "x.npy", "y.npy")]
    model.save(paths[0])
    np.save(paths[1], x)
    run_script(LOAD, *paths, *imports)
    assert_same_bits(np.load(paths[2]), model.predict(x))


# ---- errors ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 0}, "heads must be a positive integer, got 0"),
        ({"kv_heads": 3}, "kv_heads must divide heads=4, got 3"),
        ({"heads": 5}, "heads must divide the width 32 .* got 5"),
        ({"head_dim": 12}, "head_dim must be a multiple of 8 and at most 256, got 12"),
        ({"head_dim": 264}, "head_dim must be a multiple of 8 .* got 264"),
        ({"attn_mode": "global"}, "attn_mode must be 'all', .* got 'global'"),
        ({"attn_mode": None}, "attn_mode must be 'all', .* got None"),
        ({"attn_mode": "local"}, "local_attn_ctx must be a positive integer, got None"),
        ({"block_size": 7}, "got 7"),
        ({"block_size": 8.0}, "block_size must be a positive integer, got 8.0"),
        ({"num_verts": np.array(2)}, r"num_verts must be .* integer, got array\(2\)"),
        ({"block_mask": everyone(2)}, "1 head or heads = 4, got .* 2 heads"),
        (
            {"block_mask": sa.BlockMask(np.eye(2), None, 8)},
            "q_len = kv_len = time = 40 .* got q_len = 16, kv_len = 16",
        ),
        (
            {"block_mask": everyone(), "attn_mode": "local"},
            "attn_mode must be left out beside a block_mask, got 'local'",
        ),
    ],
)
def test_wrong_arguments_are_errors_before_anything_runs(options, message):
    with pytest.raises(ValueError, match=message):
        layer = sa.SparseSelfAttention(**{"heads": 4, **options})
        layer(keras.Input([TIME, WIDTH]))


def test_a_block_mask_that_is_none_is_an_error():
    with pytest.raises(TypeError, match="block_mask must be a BlockMask, got ndarray"):
        sa.SparseSelfAttention(4, block_mask=np.eye(2))


def test_an_unknown_time_is_an_error_that_says_what_to_do():
    message = r"x must have a time and .*; give keras.Input\(\[time, width\]\)"
    with pytest.raises(ValueError, match=message):
        attention()(keras.Input([None, WIDTH]))


def test_a_block_mask_tells_the_time():
    layer = sa.SparseSelfAttention(4, block_mask=everyone())
    layer.build([None, None, WIDTH])
    assert layer(tf.ones([1, TIME, WIDTH])).shape == (1, TIME, WIDTH)


def with_unknown_times(layer):
    """A model of the layer, built for TIME, whose x and mask have any time."""
    if not layer.built:
        layer.build([None, TIME, WIDTH])
    inputs = keras.Input([None, WIDTH]), keras.Input([None], dtype="bool")
    return keras.Model(inputs, layer(inputs[0], mask=inputs[1]))


def test_a_longer_x_is_an_error():
    message = f"x must have at most time = {TIME} positions"
    layer, x = attention(), normal(1, TIME + 1, WIDTH)
    model = with_unknown_times(layer)
    model.predict([x[:, 1:], np.ones([1, TIME], bool)])
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        model.predict([x, np.ones([1, TIME + 1], bool)])
    with pytest.raises(ValueError, match=message + r", got shape \(1, 41, 32\)"):
        layer(tf.constant(x))


@pytest.mark.parametrize("time, is_masked", [(TIME, True), (25, True), (25, False)])
def test_no_query_sees_what_a_shorter_x_is_padded_with(time, is_masked):
    layer = sa.SparseSelfAttention(4, block_mask=everyone())
    functional(layer, TIME, WIDTH)
    lengths = np.array([time, 17, 0] if is_masked else [time] * 3, np.int32)
    x, is_token = normal(3, time, WIDTH), np.arange(time) < lengths[:, None]
    if is_masked:
        got = with_unknown_times(layer).predict([x, is_token])
    else:
        inputs = keras.Input([None, WIDTH])
        got = keras.Model(inputs, layer(inputs)).predict(x)
    padded = np.pad(x, [(0, 0), (0, TIME - time), (0, 0)], "constant")
    oracle, plain = (
        layer_by_hand(layer, padded, np.zeros_like(padded), dtype, lengths)[0][:, :time]
        for dtype in ("float64", "float32")
    )
    assert_close(got, oracle, plain, 2)


@pytest.mark.parametrize("x_time, mask_time", [(TIME, 25), (25, TIME)])
def test_a_mask_of_another_time_is_refused_when_the_graph_runs(x_time, mask_time):
    model = with_unknown_times(attention())
    model.predict([normal(1, TIME, WIDTH), np.ones([1, TIME], bool)])
    message = r"mask must be \[batch, time\] with the time of x"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        model.predict([normal(1, x_time, WIDTH), np.ones([1, mask_time], bool)])


def test_what_needs_keras_3_says_so(monkeypatch):
    monkeypatch.setattr("sparse_attention.keras.backend.IS_KERAS_3", False)
    with pytest.raises(ImportError, match="SparseTransformer needs Keras 3, .* got Ke"):
        sa.SparseTransformer(*range(5))


@pytest.mark.parametrize("time", [TIME // 2, 2 * TIME])
def test_a_mask_of_another_length_is_refused(time):
    layer = attention()
    with pytest.raises(
        ValueError, match=rf"mask must be \[batch.* where the time is {TIME}"
    ):
        layer(tf.ones([2, TIME, WIDTH]), mask=np.ones([2, time], bool))


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_fixed_takes_any_number_of_heads_by_default(heads):
    layer = sa.SparseSelfAttention(heads, 8, "fixed", local_attn_ctx=32, block_size=8)
    layer.build([1, 64, 8 * heads])
    assert layer.block_mask.heads == (heads if heads > 1 else 1)
    again = sa.SparseSelfAttention.from_config(layer.get_config())
    assert again.num_verts is None
