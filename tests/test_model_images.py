"""SparseTransformer as a model of images: positions by axes, plans, shared key heads."""

import functools
import json

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_close, plain_attention_fwd
from keras_helpers import model_by_hand
from tf_helpers import assert_same_bits, run_script

import sparse_attention as sa
from sparse_attention.plan.reference import attention_fwd

AXES = 6, 4, 3  # rows, columns, channels
TIME, WIDTH, LAYERS, HEADS, VOCAB, BATCH = 72, 32, 3, 4, 50, 3
ROW, NARROW = (
    sa.BlockMask(sa.local_layout(TIME, 8, 24), sa.local_mask(window), 8)
    for window in (12, 11)
)
COLUMN = sa.pattern_block_mask("strided", TIME, HEADS, 8, 12)
BEFORE = sa.BlockMask(np.tri(3), sa.neighborhood_mask(AXES, 1, causal=True), 32, 72, 72)
OPTIONS = {
    "kv_heads": {"kv_heads": 2},
    "one_plan": {"block_mask": BEFORE},
    "plans": {"block_mask": [ROW, COLUMN]},
    "position_axes": {"position_axes": AXES},
}
ALL = {"kv_heads": 1, "block_mask": (BEFORE, COLUMN), "position_axes": list(AXES)}
EVERY = {**OPTIONS, "all": ALL}


def transformer(**options):
    keras.utils.set_random_seed(0)
    if "block_mask" not in options:
        options = {"attention": "local,strided", **options}
    sizes = {"local_attn_ctx": 24, "block_size": 8}
    model = sa.SparseTransformer(
        VOCAB, TIME, LAYERS, WIDTH, HEADS, **{**sizes, **options}
    )
    model.build([None, TIME])
    return model


def tokens(time=TIME, seed=0):
    print("seed", seed)
    return np.random.RandomState(seed).randint(0, VOCAB, [BATCH, time])


def trained(**options):
    model = transformer(**options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss)
    x = tokens()
    history = model.fit(x, np.roll(x, -1, axis=1), epochs=6, verbose=0).history
    assert history["loss"][-1] < history["loss"][0] - 0.1
    return model


@functools.lru_cache(maxsize=None)
def trained_with(name):
    """A model that no test changes."""
    return trained(**EVERY[name])


# ---- numbers ----


@pytest.mark.parametrize("time", [TIME, 29])
@pytest.mark.parametrize("name", EVERY)
def test_logits_equal_the_paper_written_out(name, time):
    model, x = trained_with(name), tokens(time)
    whole = np.pad(x, [(0, 0), (0, TIME - time)])
    oracle, plain = (
        model_by_hand(model, whole, dtype, attention)[:, :time]
        for dtype, attention in (
            (np.float64, attention_fwd),
            (np.float32, plain_attention_fwd),
        )
    )
    assert_close(model(x).numpy(), oracle, plain, 2)


def test_plans_take_turns():
    plans = [
        block.attention.block_mask
        for block in transformer(block_mask=[ROW, COLUMN]).blocks
    ]
    assert plans[0] is plans[2] is ROW and plans[1] is COLUMN
    assert transformer(block_mask=BEFORE).blocks[2].attention.block_mask is BEFORE


def test_key_heads_are_shared():
    model = transformer(kv_heads=2)
    assert [block.attention.kv_heads for block in model.blocks] == LAYERS * [2]
    fewer = 2 * LAYERS * (WIDTH + 1) * WIDTH // 2  # half of k and of v
    assert model.count_params() == transformer().count_params() - fewer


def test_embeddings_of_axes_start_as_those_of_positions_do():
    deviations = []
    for axes in (None, (64, 1, 2), (128,)):
        model = sa.SparseTransformer(VOCAB, 128, 1, 64, 4, "all", position_axes=axes)
        model.build([None, 128])
        deviations.append(np.std(model.position_embedding.embeddings))
    assert 0.9 < np.min(deviations) * 64**0.5 <= np.max(deviations) * 64**0.5 < 1.1
    tables = transformer(position_axes=(6, 6, 2)).position_embedding.get_weights()
    assert (tables[0] != tables[1]).any()


def test_positions_looked_up_are_those_of_all():
    positions = transformer(position_axes=AXES).position_embedding
    whole = positions.embeddings.numpy()
    for wanted in (np.arange(TIME), np.array([[71, 0], [5, 12]])):
        assert_same_bits(positions(wanted).numpy(), whole[wanted])
        assert_same_bits(positions(tf.constant(wanted)).numpy(), whole[wanted])


# ---- training ----


def position_gradients(model, x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=True) ** 2)
    return tape.gradient(loss, model.position_embedding.trainable_weights)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("time", [TIME, 41])
def test_the_gradient_of_an_axis_is_the_sum_over_the_others(time, dtype):
    by_axes = transformer(position_axes=AXES, dtype=dtype)
    by_position = transformer(dtype=dtype)
    table = by_axes.position_embedding.embeddings
    tokens_weight, *others = by_axes.trainable_weights
    same = [tokens_weight, table, *others[len(AXES) :]]
    for weight, value in zip(by_position.trainable_weights, same, strict=True):
        weight.assign(value)
    x = tokens(time)
    (whole,) = position_gradients(by_position, x)
    gradients = position_gradients(by_axes, x)
    # With several replicas Keras' Adam does not add up those of look-ups.
    assert all(tf.is_tensor(gradient) for gradient in gradients)
    for axis, gradient in enumerate(gradients):
        others = tuple({0, 1, 2} - {axis})
        oracle, plain = (
            whole.numpy().astype(dtype).reshape(*AXES, WIDTH).sum(others)
            for dtype in (np.float64, np.float32)
        )
        assert np.abs(oracle).max(axis=1).all() or time < TIME
        assert_close(gradient.numpy(), oracle, plain, 3)


def test_axes_are_added_in_the_dtype_of_the_weights_and_rounded_once():
    model = transformer(position_axes=AXES, dtype="mixed_bfloat16")
    positions = model.position_embedding
    tables = positions.get_weights()
    places = np.unravel_index(np.arange(TIME), AXES)
    exact = sum(table[index] for table, index in zip(tables, places))
    assert exact.dtype == np.float32
    want = tf.cast(exact, tf.bfloat16).numpy()
    assert_same_bits(positions.embeddings.numpy(), want)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss)
    model.fit(tokens(), tokens(seed=1), verbose=0)
    after = positions.get_weights()
    assert all((old != new).any() for old, new in zip(tables, after))


def test_recompute_trains_to_the_same_bits():
    plain, again = (trained(recompute=r, dropout=0.1, **ALL) for r in (False, True))
    assert_same_bits(plain.get_weights(), again.get_weights())


# ---- generation ----


@pytest.mark.parametrize("name", EVERY)
def test_generated_tokens_are_those_of_the_whole_model(name):
    model = transformer(**EVERY[name])
    random = np.random.RandomState(0)
    for weight in model.trainable_weights:  # so that tokens differ
        scale = 2 * weight.shape[0] ** -0.5
        weight.assign(weight + scale * random.standard_normal(weight.shape))
    prompts = [tokens()[0, :31], tokens()[1, :1], tokens()[2, :12]]
    got, statistics = sa.generate(model, prompts, TIME + 1 - 31, temperature=0)
    assert len(np.unique(got)) > 5
    for prompt, own in zip(prompts, got):
        whole = np.zeros([1, TIME], int)
        prefix = [*prompt, *own[:-1]]
        whole[0, : len(prefix)] = prefix
        want = np.argmax(model(whole)[0], axis=1)[len(prompt) - 1 : len(prefix)]
        np.testing.assert_array_equal(own, want)
    kv_heads = model.get_config()["kv_heads"]
    key_bytes = 2 * LAYERS * kv_heads * (WIDTH // HEADS) * 4
    mean_position = np.mean([len(p) for p in prompts]) + (TIME - 31) / 2
    assert statistics.dense_bytes_per_token == pytest.approx(mean_position * key_bytes)


# ---- files ----

LOAD = """
import sys
import sparse_attention as sa
import keras
import numpy as np
x = np.load(sys.argv[1] + "/x.npy")
for name in sys.argv[2:]:
    loaded = keras.models.load_model(sys.argv[1] + f"/{name}.keras")
    np.save(sys.argv[1] + f"/{name}.npy", loaded(x))
"""


def test_files_give_the_same_bits_in_a_new_process(tmp_path):
    models = {name: trained_with(name) for name in EVERY}
    np.save(tmp_path / "x.npy", tokens())
    for name, model in models.items():
        model.save(tmp_path / f"{name}.keras")
        config = json.loads(json.dumps(model.get_config()))
        again = sa.SparseTransformer.from_config(config)
        assert again.get_config() == model.get_config()
    run_script(LOAD, tmp_path, *models)
    for name, model in models.items():
        got = np.load(tmp_path / f"{name}.npy")
        assert_same_bits(got, model(tokens()).numpy())


def test_a_file_without_axes_has_the_names_that_it_always_had(tmp_path):
    path, names = tmp_path / "model.weights.h5", []
    transformer().save_weights(path)
    with h5py.File(path) as file:
        file["layers"].visit(names.append)
    assert [name for name in names if name.endswith("0")] == [
        "embedding/vars/0",
        "embedding_1/vars/0",
    ]


def test_plans_that_are_made_again_load_the_same_weights(tmp_path):
    path = tmp_path / "model.weights.h5"
    model = trained_with("all")
    model.save_weights(path)
    again = [
        sa.BlockMask(plan.layout, plan.to_dense(), plan.block_size, TIME, TIME)
        if plan.row_stride == 1
        else sa.BlockMask.from_config(plan.get_config())
        for plan in (BEFORE, COLUMN)
    ]
    other = transformer(**{**ALL, "block_mask": again})
    other.load_weights(path)
    assert_same_bits(other.get_weights(), model.get_weights())


@pytest.mark.parametrize(
    "there, here, message",
    [
        ({}, {"kv_heads": 2}, "kv_heads = 4 there, 2 here"),
        ({}, {"position_axes": AXES}, r"axes = None there, \[6, 4, 3\] here"),
        ({"position_axes": AXES}, {"position_axes": [4, 6, 3]}, r"\[6, 4, 3\] there"),
        (
            {"block_mask": BEFORE},
            {},
            r"attention = None there, local,strided here; local_attn_ctx = None there, "
            r".*block_mask = \['[0-9a-f]{16}'\] there, None here",
        ),
        ({}, {"block_mask": BEFORE}, r"block_mask = None there, \['[0-9a-f]{16}'\]"),
        ({"block_mask": BEFORE}, {"block_mask": ROW}, "block_mask = "),
        ({"block_mask": NARROW}, {"block_mask": ROW}, "block_mask = "),
        ({"block_mask": [ROW, COLUMN]}, {"block_mask": [COLUMN, ROW]}, "block_mask = "),
    ],
)
def test_weights_of_other_options_are_an_error(there, here, message, tmp_path):
    path = tmp_path / "model.weights.h5"
    transformer(**there).save_weights(path)
    transformer(**there).load_weights(path)
    with pytest.raises(ValueError, match=message):
        transformer(**here).load_weights(path)


# ---- errors ----

AHEAD = sa.BlockMask(sa.dense_layout(TIME, 8), sa.window_mask(5, 2), 8)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"kv_heads": 3}, ValueError, "kv_heads must divide heads=4, got 3"),
        ({"kv_heads": 0}, ValueError, "kv_heads must be a positive integer, got 0"),
        ({"kv_heads": 2.0}, ValueError, "kv_heads must be a positive integer, got 2.0"),
        (
            {"block_mask": AHEAD},
            ValueError,
            "block_mask must be causal, .* row 0 attends to row 2; .*causal_mask",
        ),
        ({"block_mask": [ROW, AHEAD]}, ValueError, "block_mask must be causal"),
        ({"block_mask": []}, ValueError, "block_mask must hold at least one BlockMask"),
        ({"block_mask": np.tri(TIME)}, TypeError, "a BlockMask .*, got ndarray"),
        ({"block_mask": [ROW, None]}, TypeError, "a BlockMask .*, got NoneType"),
        (
            {"block_mask": sa.pattern_block_mask("all", 64, 4, 8)},
            ValueError,
            "block_mask must have q_len = kv_len = time = 72 .* got q_len = 64",
        ),
        (
            {"block_mask": sa.pattern_block_mask("fixed", TIME, 2, 8, 24, 2)},
            ValueError,
            "1 head or heads = 4, got .* 2 heads",
        ),
        (
            {"block_mask": ROW, "attention": "local"},
            ValueError,
            "attention must be left out beside a block_mask, got 'local'",
        ),
        ({"attention": None}, TypeError, "attention must be a str, .* got None"),
        (
            {"position_axes": (6, 4, 4)},
            ValueError,
            r"position_axes must be sizes whose product is time=72, got \(6, 4, 4\)",
        ),
        ({"position_axes": ()}, ValueError, "whose product is time=72, got"),
        ({"position_axes": (-6, -4, 3)}, ValueError, r"axes\[0\] must be a pos.* -6"),
        ({"position_axes": (6, 4, 3.0)}, ValueError, r"axes\[2\] must be a .* got 3.0"),
        ({"position_axes": 72}, ValueError, "position_axes must be a list .*, got 72"),
    ],
)
def test_wrong_arguments_are_errors_at_once(options, error, message):
    arguments = {"local_attn_ctx": 24, "block_size": 8, **options}
    with pytest.raises(error, match=message):
        sa.SparseTransformer(VOCAB, TIME, LAYERS, WIDTH, HEADS, **arguments)
