"""SparseTransformer: the paper's architecture, through fit, files and recomputation."""

import json
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_close, plain_attention_fwd
from keras_helpers import model_by_hand
from tf_helpers import assert_same_bits, run_on_two_cpus

import sparse_attention as sa
from sparse_attention.keras.transformer_block import Embedding
from sparse_attention.plan.reference import attention_fwd

TIME, WIDTH, LAYERS, VOCAB = 64, 32, 2, 50


def transformer(**options):
    defaults = {
        "attention": "local,strided",
        "local_attn_ctx": 16,
        "block_size": 8,
    }
    keras.utils.set_random_seed(0)
    model = sa.SparseTransformer(
        VOCAB, TIME, LAYERS, WIDTH, 4, **{**defaults, **options}
    )
    model.build([None, TIME])
    return model


def tokens(batch=2, seed=0):
    print("seed", seed)
    return np.random.RandomState(seed).randint(0, VOCAB, [batch, TIME])


def trained(**options):
    model = transformer(**options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    x = tokens(batch=6)
    model.fit(x, np.roll(x, -1, axis=1), batch_size=2, shuffle=False, verbose=0)
    return model


# ---- numbers ----


def test_logits_equal_the_paper_written_out():
    model, x = trained(), tokens()
    oracle = model_by_hand(model, x, np.float64, attention_fwd)
    plain = model_by_hand(model, x, np.float32, plain_attention_fwd)
    assert_close(model(x).numpy(), oracle, plain, 2)


def test_count_params_counts_the_weights_of_the_network():
    model = transformer()
    by_hand = (VOCAB + TIME) * WIDTH + 2 * WIDTH  # embeddings and the last norm
    by_hand += LAYERS * (12 * WIDTH**2 + 13 * WIDTH)
    assert model.count_params() == by_hand


@pytest.mark.parametrize("attention", ["all,local", "strided,fixed"])
def test_fewer_tokens_have_the_logits_that_they_have_in_the_whole(attention):
    model, x = transformer(attention=attention, num_verts=2), tokens()
    whole = model.predict(x, verbose=0)  # the next call's time is unknown to TensorFlow
    for time in (1, 37):
        got = model.predict(x[:, :time], verbose=0)
        oracle = model_by_hand(model, x, np.float64, attention_fwd)[:, :time]
        assert_close(got, oracle, whole[:, :time], 2)


def test_it_trains_on_data_whose_time_is_unknown():
    x = tokens(batch=4)
    weights = []
    for time in (TIME, None):
        spec = tf.TensorSpec([time], tf.int32)
        data = tf.data.Dataset.from_generator(
            lambda: zip(x, np.roll(x, -1, axis=1)), output_signature=(spec, spec)
        )
        model = transformer(dropout=0.1, recompute=True)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss)
        model.fit(data.batch(2), shuffle=False, verbose=0)
        weights.append(model.get_weights())
    assert_same_bits(*weights)


def test_no_token_sees_a_later_one():
    model, x = transformer(attention="all,fixed", num_verts=2), tokens()
    changed = x.copy()
    changed[:, 40:] = tokens(seed=1)[:, 40:]
    assert_same_bits(model(x)[:, :40].numpy(), model(changed)[:, :40].numpy())
    assert (model(x)[:, 40:] != model(changed)[:, 40:]).numpy().any()


def test_patterns_take_turns():
    model = sa.SparseTransformer(
        VOCAB, TIME, 3, WIDTH, 4, "fixed, dense", 16, 8, num_verts=2
    )
    model.build([None, TIME])
    plans = [block.attention.block_mask for block in model.blocks]
    fixed = sa.pattern_block_mask("fixed", TIME, 4, 8, 16, 2, 1)
    assert plans[0] is plans[2] is fixed
    assert plans[1] is sa.pattern_block_mask("all", TIME, 4, 8, 16, 2, 1)


def test_weights_start_as_documented():
    layers, width = 8, 64
    model = sa.SparseTransformer(256, TIME, layers, width, 4, "all")
    model.build([None, TIME])
    block = model.blocks[-1]
    in_block = (2 * layers) ** -0.5
    for weights, deviation in (
        (model.token_embedding.embeddings, width**-0.5),
        (block.attention.query.kernel, width**-0.5),
        (block.expand.kernel, width**-0.5),
        (block.attention.output_dense.kernel, in_block * width**-0.5),
        (block.contract.kernel, in_block * (4 * width) ** -0.5),
    ):
        assert 0.95 < np.std(weights.numpy()) / deviation < 1.05
    assert not np.any(block.contract.bias.numpy())


@pytest.mark.parametrize("rows", [7, 2000])  # below and above FEW_ROWS
def test_the_gradient_of_a_token_is_the_sum_over_where_it_stands(rows):
    layer = Embedding(rows, 8)
    found = np.array([[0, 3, -1, 3], [3, 6, rows - 1, 0]], np.int32)
    upstream = np.random.RandomState(0).randint(-9, 9, [2, 4, 8])
    with tf.GradientTape() as tape:
        x = layer(found)
        loss = tf.reduce_sum(x * tf.cast(upstream, x.dtype))
    np.testing.assert_array_equal(x, layer.get_weights()[0][found])
    gradient = tape.gradient(loss, layer.trainable_variables[0].value)
    want = np.zeros([rows, 8])
    np.add.at(want, found, upstream)
    np.testing.assert_array_equal(tf.convert_to_tensor(gradient), want)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_policies_give_float32_logits(dtype):
    model = transformer(dtype=dtype)
    assert model(tokens()).dtype == tf.float32
    assert model.blocks[0].attention.compute_dtype == dtype[6:]
    assert {w.dtype for w in model.trainable_weights} == {"float32"}


def test_a_training_step_makes_no_tensor_larger_than_its_widest_layer():
    model, x = transformer(), tf.constant(tokens(batch=4))

    def step():
        with tf.GradientTape() as tape:
            logits = model(x)
        return tape.gradient(logits, model.trainable_weights)

    graph = tf.function(step).get_concrete_function().graph
    sizes = [
        t.shape.num_elements() for op in graph.get_operations() for t in op.outputs
    ]
    assert max(filter(None, sizes)) == 4 * TIME * 4 * WIDTH


# ---- recomputation and dropout ----


def test_recompute_trains_to_the_same_bits_with_dropout():
    plain, again = (trained(recompute=r, dropout=0.25) for r in (False, True))
    assert_same_bits(plain.get_weights(), again.get_weights())


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_runs_each_attention_once_more(recompute):
    model = transformer(recompute=recompute)

    @tf.function
    def gradients(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True))
        return tape.gradient(loss, model.trainable_weights)

    graph = gradients.get_concrete_function(tf.constant(tokens())).graph
    types = [op.type for op in graph.get_operations()]
    assert types.count("BlockSparseAttention") == LAYERS * (1 + recompute)


def test_dropout_differs_by_call_and_comes_back_with_the_weights():
    model, x = transformer(dropout=0.5), tokens()
    weights = model.get_weights()
    first, second = (model(x, training=True).numpy() for _ in range(2))
    assert (first != second).any() and (first != model(x).numpy()).any()
    assert_same_bits(model(x).numpy(), model(x, training=False).numpy())
    model.set_weights(weights)
    assert_same_bits(model(x, training=True).numpy(), first)


# ---- two devices ----

MIRRORED = """
import mirrored
mirrored.check_plans(["CPU:0", "CPU:1"])
mirrored.check_op(["CPU:0", "CPU:1"])
for attention in ("fixed", "local,strided"):
    mirrored.check_training(["CPU:0", "CPU:1"], attention)
"""


def test_two_devices_train_as_one():
    run_on_two_cpus(MIRRORED)


# ---- files ----


def test_a_file_gives_the_same_bits(tmp_path):
    model, x = trained(dropout=0.25, recompute=True, dtype="mixed_float16"), tokens()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_bits(loaded(x).numpy(), model(x).numpy())
    states = [
        [variable.numpy() for variable in m.optimizer.variables]
        for m in (model, loaded)
    ]
    assert_same_bits(*states)
    config = json.loads(json.dumps(model.get_config()))
    assert sa.SparseTransformer.from_config(config).get_config() == model.get_config()


def test_numpys_integers_are_saved_as_pythons(tmp_path):
    sizes = [VOCAB, TIME, LAYERS, WIDTH, 4]
    options = {"local_attn_ctx": 16, "block_size": 8, "num_verts": 2, "vertsize": 1}
    model, wide = (
        sa.SparseTransformer(
            *map(integer, sizes),
            **{name: integer(size) for name, size in options.items()},
            dropout=real(0.25),
        )
        for integer, real in ((int, float), (np.int64, np.float32))
    )
    wide.build([None, TIME])
    wide.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_bits(loaded(tokens()).numpy(), wide(tokens()).numpy())
    assert {**wide.get_config(), "name": ""} == {**model.get_config(), "name": ""}
    model.build([None, TIME])
    model.load_weights(tmp_path / "model.keras")


# ---- errors ----


def test_the_model_is_not_quantized():
    model, x = transformer(), tokens()
    before = model(x).numpy()
    with pytest.raises(NotImplementedError, match="to 'int8' .*'mixed_bfloat16'"):
        model.quantize("int8")
    inputs = keras.Input([TIME], dtype="int32")
    outer = keras.Model(inputs, keras.layers.Dense(8)(model(inputs)))
    with pytest.warns(UserWarning, match="keep their dtype policy 'float32'"):
        outer.quantize("int8")
    assert_same_bits(model(x).numpy(), before)
    decoder = sa.Decoder(model, len(x))
    decoder.prefill(x[:, :-1])
    got = decoder.step(x[:, -1], TIME - 1).numpy()
    oracle = model_by_hand(model, x, np.float64, attention_fwd)[:, -1]
    assert_close(got, oracle, before[:, -1], 2)
    with pytest.raises(ValueError, match="without quantiz.* got 'int8_from_float32'"):
        transformer(dtype="int8_from_float32")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 3}, r"width must be a multiple of 8 \* heads = 24, got 32"),
        ({"layers": 0}, "layers must be a positive integer, got 0"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer, got -1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"attention": "local,global"}, "attn_mode must be 'all', .* got 'global'"),
        ({"attention": ""}, "attn_mode must be 'all', .* got ''"),
        ({"local_attn_ctx": None}, "local_attn_ctx must be a positive integer"),
        ({"block_size": 24}, "must be a multiple of block_size=24, got 128"),
        ({"block_size": 8.0}, "block_size must be a positive integer, got 8.0"),
        ({"heads": 4.0}, "heads must be a positive integer, got 4.0"),
        ({"num_verts": 3}, "heads must be a multiple of num_verts=3, got 4"),
    ],
)
def test_wrong_arguments_are_errors_at_once(options, message):
    arguments = {"vocab_size": VOCAB, "time": TIME, "layers": 2, "width": WIDTH}
    with pytest.raises(ValueError, match=message):
        sa.SparseTransformer(**{**arguments, "heads": 4, **options})


def test_a_file_with_the_adam_of_version_0_1_trains_on_by_keras_own(tmp_path):
    trained().save(tmp_path / "new.keras")
    with zipfile.ZipFile(tmp_path / "new.keras") as new:
        parts = {name: new.read(name) for name in new.namelist()}
    config = json.loads(parts["config.json"])
    config["compile_config"]["optimizer"].update(
        module="sparse_attention.keras.optimizer",
        registered_name="sparse_attention>Adam",
    )
    parts["config.json"] = json.dumps(config)
    with zipfile.ZipFile(tmp_path / "old.keras", "w") as old:
        for name, content in parts.items():
            old.writestr(name, content)
    new, old = (
        keras.models.load_model(tmp_path / f"{n}.keras") for n in ("new", "old")
    )
    assert type(old.optimizer) is keras.optimizers.Adam
    x = tokens(batch=6)
    for model in new, old:
        model.fit(x, np.roll(x, -1, axis=1), batch_size=2, shuffle=False, verbose=0)
    assert_same_bits(new.get_weights(), old.get_weights())


@pytest.mark.parametrize("name", ["more.weights.h5", "more.keras"])
def test_weights_of_another_configuration_are_an_error(name, tmp_path):
    model = transformer(attention="fixed", num_verts=2, dropout=0.5, recompute=True)
    (model.save if name.endswith(".keras") else model.save_weights)(tmp_path / name)
    transformer(attention="fixed", num_verts=2).load_weights(tmp_path / name)
    fewer = sa.SparseTransformer(VOCAB, TIME, 1, WIDTH, 4, "local", 16, 8, num_verts=2)
    fewer.build([None, TIME])
    message = "layers = 2 there, 1 here; attention = fixed there, local here"
    with pytest.raises(ValueError, match=message):
        fewer.load_weights(tmp_path / name)


def test_more_tokens_than_the_time_are_an_error():
    model, x = transformer(), np.zeros([2, TIME + 1], np.int32)
    message = "tokens must have at most time = 64 positions"
    with pytest.raises(ValueError, match=message + r", got shape \(2, 65\)"):
        model(x)
    model.predict(x[:, 1:], verbose=0)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        model.predict(x, verbose=0)
    with pytest.raises(ValueError, match=r"tokens must be \[batch, time\], got shape"):
        model(x[0])


@pytest.mark.parametrize(
    "attention, heads", [("fixed", 6), ("all,fixed", 1), ("all", 2)]
)
def test_fixed_chooses_columns_and_saves_them(attention, heads, tmp_path):
    sizes = (VOCAB, TIME, 1, 8 * heads, heads, attention, 16, 8)
    model = sa.SparseTransformer(*sizes)
    model(np.zeros([1, TIME], np.int32))
    model.save_weights(tmp_path / "model.weights.h5")
    columns = {"fixed": 2, "all,fixed": 1, "all": None}[attention]
    assert model.get_config()["num_verts"] == columns
    again = sa.SparseTransformer(*sizes, num_verts=columns)
    again(np.zeros([1, TIME], np.int32))
    again.load_weights(tmp_path / "model.weights.h5")
