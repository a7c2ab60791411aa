"""`sa.MultiHeadAttention`, `sa.GroupQueryAttention` and `sa.sparsify` beside Keras's layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from flash_helpers import assert_as_close, counted, in_policy, outputs_and_gradients
from helpers import assert_close, check_twice_at_most
from keras_helpers import normal
from tf_helpers import assert_same_bits, run_script

import sparse_attention as sa
from sparse_attention.keras import attention_layers, flash_attention
from sparse_attention.native import loader

TIME, WIDTH, HEADS = 40, 24, 4
NAMES = ["MultiHeadAttention", "GroupQueryAttention"]
PATTERNS = {
    "all": {"attn_mode": "all", "block_size": 8},
    "local": {"attn_mode": "local", "local_attn_ctx": 16, "block_size": 8},
    "strided": {"attn_mode": "strided", "local_attn_ctx": 3, "block_size": 8},
    "fixed": {"attn_mode": "fixed", "local_attn_ctx": 16, "block_size": 8},
}
WINDOW = sa.Mask(lambda head, q, k: abs(q - k) <= 5)


@pytest.fixture(autouse=True)
def same_weights_in_every_run():
    keras.utils.set_random_seed(0)


def layer_of(kind, module=sa, **options):
    cls = getattr(module, kind)
    if kind == "MultiHeadAttention":
        return cls(HEADS, 8, value_dim=16, **options)
    return cls(8, HEADS, 2, **options)


def model_of(layer, time=TIME, **call):
    inputs = keras.Input([time, WIDTH])
    x = keras.layers.Dense(WIDTH)(inputs)
    return keras.Model(inputs, layer(x, x, **call))


def with_mask(name, mask, time=TIME):
    """A model of Keras's layer that is given a plan as a mask."""
    inputs = keras.Input([time, WIDTH])
    x = keras.layers.Dense(WIDTH)(inputs)
    y = layer_of(name, keras.layers)(x, x, attention_mask=mask)
    return keras.Model(inputs, y)


def check_equals_keras(model, keras_model, x, **paths):
    """Outputs and gradients are those of Keras's layer with the same weights."""
    keras_model.set_weights(model.get_weights())
    with counted(**paths):
        got = outputs_and_gradients(model, x)
    plain = outputs_and_gradients(keras_model, x)
    oracle = outputs_and_gradients(in_policy(keras_model, "float64"), x)
    assert_as_close(got, oracle, plain)


# ---- numbers ----


@pytest.mark.parametrize("mode", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_patterns_equal_keras_layer_with_the_same_mask(name, mode):
    plan = sa.pattern_block_mask(
        mode, TIME, HEADS, 8, PATTERNS[mode].get("local_attn_ctx")
    )
    model = model_of(layer_of(name, **PATTERNS[mode]))
    mask = plan.to_dense()[None]
    check_equals_keras(model, with_mask(name, mask), normal(2, TIME, WIDTH), fused=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}], ids=str)
def test_without_a_pattern_they_are_keras_layers(name, call):
    model = model_of(layer_of(name), **call)
    plain = model_of(layer_of(name, keras.layers), **call)
    check_equals_keras(model, plain, normal(2, TIME, WIDTH), fused=1)


def test_a_pattern_is_causal_with_and_without_being_asked():
    layer = layer_of("MultiHeadAttention", **PATTERNS["local"])
    x = normal(2, TIME, WIDTH)
    with counted(fused=2):
        a, b = layer(x, x), layer(x, x, use_causal_mask=True)
    assert_same_bits(a.numpy(), b.numpy())


def test_cross_attention_by_a_plan_for_two_lengths():
    plan = sa.BlockMask(sa.dense_layout(TIME, 8, 64), WINDOW, 8, TIME, 60)
    ours, theirs = (
        layer_of("MultiHeadAttention", module, **options)
        for module, options in ((sa, {"block_mask": plan}), (keras.layers, {}))
    )
    query, value, key = normal(2, TIME, 8), normal(2, 60, 12), normal(2, 60, 20)
    with counted(fused=1):
        got = ours(query, value, key)
    theirs.build((2, TIME, 8), (2, 60, 12), (2, 60, 20))
    theirs.set_weights(ours.get_weights())
    plain = theirs(query, value, key, attention_mask=plan.to_dense()).numpy()
    np.testing.assert_array_less(np.abs(got - plain), 1e-5 * np.abs(plain).max())


def test_mixed_policies():
    model = model_of(layer_of("MultiHeadAttention", **PATTERNS["local"]))
    mixed = in_policy(model, "mixed_bfloat16")
    x = normal(2, TIME, WIDTH)
    plan = sa.pattern_block_mask("local", TIME, HEADS, 8, 16).to_dense()[None]
    plain, oracle = (
        in_policy(with_mask("MultiHeadAttention", plan), policy)
        for policy in ("mixed_bfloat16", "float64")
    )
    plain.set_weights(model.get_weights())
    oracle.set_weights(model.get_weights())
    with counted(fused=1):
        got = outputs_and_gradients(mixed, x)
    assert_as_close(
        got, outputs_and_gradients(oracle, x), outputs_and_gradients(plain, x)
    )


# ---- what the fused op cannot take ----


@pytest.fixture(params=["kernels", "keras"])
def path(request, monkeypatch):
    """What the fused op does not take is left to Keras."""
    if request.param == "kernels":
        return {"fused": 1}
    monkeypatch.setattr(flash_attention, "MAX_HEAD_DIM", 0)
    attention_layers._warn_once.cache_clear()
    return {"keras": 1}


def by_keras(layer, name, x, mask):
    """What Keras's layer with the same weights gives, in float32 and float64."""
    for dtype in ("float32", "float64"):
        theirs = layer_of(name, keras.layers, dtype=dtype)
        theirs.build(x.shape, x.shape)
        theirs.set_weights(layer.get_weights())
        yield theirs(x, x, attention_mask=mask).numpy()


@pytest.mark.filterwarnings("ignore:a sparse attention layer runs by Keras")
@pytest.mark.parametrize("name", NAMES)
def test_masks_and_the_plan_hold_both(name, path):
    layer = layer_of(name, **PATTERNS["local"])
    x = normal(2, TIME, WIDTH)
    mask = np.arange(TIME) < [[TIME], [27]]
    mask[1, -1] = True
    mask = mask[:, None] | np.eye(TIME, dtype=bool)  # each query sees itself at least
    plan = sa.pattern_block_mask("local", TIME, HEADS, 8, 16).to_dense()
    with counted(**path):
        got = layer(x, x, attention_mask=mask).numpy()
    plain, oracle = by_keras(layer, name, x, mask[:, None] & plan)
    assert_close(got, oracle, plain, 2)


@pytest.mark.filterwarnings("ignore:a sparse attention layer runs by Keras")
@pytest.mark.parametrize("name", NAMES)
def test_without_a_pattern_masks_and_causal_hold_both(name, path):
    layer = layer_of(name)
    x = normal(2, TIME, WIDTH)
    mask = np.random.RandomState(0).rand(2, TIME, TIME) < 0.7
    mask |= np.eye(TIME, dtype=bool)
    with counted(**path):
        got = layer(x, x, attention_mask=mask, use_causal_mask=True).numpy()
    plain, oracle = by_keras(layer, name, x, mask & np.tri(TIME, dtype=bool))
    assert_close(got, oracle, plain, 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_keras_mask_hides_the_padding(name):
    embed = keras.layers.Embedding(9, WIDTH, mask_zero=True)
    layer = layer_of(name, **PATTERNS["local"])
    tokens = np.random.RandomState(0).randint(1, 9, [2, TIME])
    tokens[:, 30:] = 0
    x = embed(tokens)
    with counted(fused=2):
        a = layer(x, x)[:, :30].numpy()
        embed.set_weights([w + np.eye(9, 1) for w in embed.get_weights()])  # of padding
        x = embed(tokens)
        b = layer(x, x)[:, :30].numpy()
    assert_same_bits(a, b)


@pytest.mark.filterwarnings("ignore:a sparse attention layer runs by Keras")
@pytest.mark.parametrize("name", NAMES)
def test_dropout_in_training_stays_in_the_pattern(name, path):
    layer = layer_of(name, dropout=0.5, **PATTERNS["local"])
    x = tf.constant(normal(2, TIME, WIDTH))
    with counted(**path):
        plain = layer(x, x).numpy()
    with counted(**path):
        dropped = layer(x, x, training=True).numpy()
    assert np.abs(plain - dropped).max() > 0.01
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, x, training=True)[:, 20]
    reached = np.abs(tape.gradient(y, x)).max(axis=(0, 2)) > 0
    assert not reached[21:].any() and not reached[:5].any() and reached[20]


def test_keras_path_says_so_once(monkeypatch):
    monkeypatch.setattr(flash_attention, "MAX_HEAD_DIM", 0)
    attention_layers._warn_once.cache_clear()
    layer = layer_of("MultiHeadAttention", **PATTERNS["local"])
    x, mask = normal(2, TIME, WIDTH), np.ones([TIME, TIME], bool)
    with pytest.warns(
        RuntimeWarning, match="runs by Keras's own ops.*head dim is above"
    ):
        layer(x, x, attention_mask=mask)


def test_scores_are_an_error():
    layer = layer_of("MultiHeadAttention")
    x = normal(2, TIME, WIDTH)
    with pytest.raises(ValueError, match="return_attention_scores must be False"):
        layer(x, x, return_attention_scores=True)


CAUSAL_WINDOW = sa.BlockMask(sa.dense_layout(TIME, 8), WINDOW & sa.causal_mask(), 8)


@pytest.mark.parametrize(
    "options, call, error",
    [
        ({"attn_mode": "dense"}, {}, "attn_mode must be 'all'"),
        ({"attn_mode": "all", "block_mask": CAUSAL_WINDOW}, {}, "left out beside"),
        ({"block_mask": np.ones([1, 5, 5])}, {}, "must be a BlockMask, got ndarray"),
        ({"attn_mode": "local"}, {}, "local_attn_ctx must be"),
        ({"block_mask": sa.pattern_block_mask("all", 48, 1, 8)}, {}, "q_len = 48"),
        (
            {"block_mask": sa.BlockMask(sa.dense_layout(TIME, 8), WINDOW, 8)},
            {"use_causal_mask": True},
            "use_causal_mask=True must be left out",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(options, call, error):
    x = normal(2, TIME, WIDTH)
    with pytest.raises((ValueError, TypeError), match=error):
        layer_of("MultiHeadAttention", **options)(x, x, **call)


def test_a_causal_plan_may_go_beside_a_causal_mask_with_any_row_stride():
    strided = sa.pattern_block_mask("strided", TIME, HEADS, 8, 4)
    assert strided.row_stride == 4
    layer, x = layer_of("MultiHeadAttention", block_mask=strided), normal(2, TIME, 24)
    want = layer(x, x).numpy()
    np.testing.assert_array_equal(layer(x, x, use_causal_mask=True), want)


def test_patterns_need_one_length_that_is_known():
    layer = layer_of("MultiHeadAttention", **PATTERNS["local"])
    x = normal(2, TIME, WIDTH)
    with pytest.raises(ValueError, match="one length .* got 40 and 30"):
        layer(x, x[:, :30])
    unknown = tf.TensorSpec([None, None, WIDTH])
    with pytest.raises(ValueError, match="got None and None"):
        tf.function(lambda x: layer(x, x), input_signature=[unknown])(x)


# ---- files, LoRA, quantization ----


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_keras_layers_load_and_back(name, tmp_path):
    ours = model_of(layer_of(name, **PATTERNS["local"]))
    theirs = model_of(layer_of(name, keras.layers))
    path = str(tmp_path / "model.weights.h5")
    for a, b in ((ours, theirs), (theirs, ours)):
        b.set_weights([w + 1 for w in b.get_weights()])
        a.save_weights(path)
        b.load_weights(path)
        for x, y in zip(a.get_weights(), b.get_weights()):
            assert_same_bits(x, y)
    assert [w.path.split("/")[1:] for w in ours.weights] == [
        w.path.split("/")[1:] for w in theirs.weights
    ]


LOAD = """
import sys, numpy as np, sparse_attention
from tensorflow import keras
model = keras.models.load_model(sys.argv[1])
y = model(np.load(sys.argv[2]))
np.save(sys.argv[3], y)
"""


@pytest.mark.parametrize(
    "name, options",
    list(zip(NAMES, [PATTERNS["local"], {"block_mask": CAUSAL_WINDOW}])),
)
def test_a_saved_model_loads_in_a_process_that_only_imports_us(name, options, tmp_path):
    model = model_of(layer_of(name, **options))
    x = normal(2, TIME, WIDTH)
    paths = [str(tmp_path / name) for name in ("model.keras", "x.npy", "y.npy")]
    model.save(paths[0])
    np.save(paths[1], x)
    run_script(LOAD, *paths, PYTHONPATH=".")
    assert_same_bits(np.load(paths[2]), model(x).numpy())


@pytest.mark.parametrize("name", NAMES)
def test_lora_and_quantization_are_inherited(name):
    x = normal(2, TIME, WIDTH)
    ours, theirs = (
        model_of(layer_of(name, module, **options))
        for module, options in ((sa, {"attn_mode": "all"}), (keras.layers, {}))
    )
    theirs = model_of(layer_of(name, keras.layers), use_causal_mask=True)
    theirs.set_weights(ours.get_weights())
    for model in (ours, theirs):
        keras.utils.set_random_seed(0)
        layer = model.layers[-1]
        layer.query_dense.enable_lora(2) if name[0] == "M" else None
        model.quantize("int8")
    assert len(ours.weights) == len(theirs.weights)
    assert {w.dtype for w in ours.weights} == {w.dtype for w in theirs.weights}
    with counted(fused=1):
        got = ours(x).numpy()
    plain = theirs(x).numpy()
    np.testing.assert_array_less(np.abs(got - plain), 0.02 * np.abs(plain).max())


@pytest.mark.parametrize("name", NAMES)
def test_keras_compiles_a_model_only_where_xla_has_the_op(name, monkeypatch):
    layer = layer_of(name, attn_mode="all")
    assert layer.supports_jit
    monkeypatch.setattr(loader, "attention_xla", lambda: None)
    assert not layer.supports_jit
    model = model_of(layer)
    with pytest.warns(UserWarning, match="Model doesn't support `jit_compile=True`"):
        model.compile("sgd", "mse", jit_compile=True)
    x = normal(2, TIME, WIDTH)
    with counted(fused=1):
        model.fit(x, x, verbose=0)


# ---- sparsify ----


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """Makes its attention in its constructor, so its config does not name it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = layer_of(
            "MultiHeadAttention", keras.layers, dtype=self.dtype_policy
        )

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return x + self.attention(x, x, use_causal_mask=True)


def deep_model(seed=0):
    """Its weights are of the sizes that Keras gives them from 3.11 on; before, smaller."""
    inputs = keras.Input([TIME, WIDTH])
    x = Block(name="block")(inputs)
    inner = model_of(layer_of("GroupQueryAttention", keras.layers, name="inner"))
    x = inner(x)
    x = layer_of("MultiHeadAttention", keras.layers, name="outer")(x, x)
    model = keras.Model(inputs, x)
    weights = [normal(*w.shape, seed=seed + i) for i, w in enumerate(model.weights)]
    model.set_weights([w / WIDTH**0.5 for w in weights])
    return model


def kinds(model):
    return {
        layer.name: type(layer).__module__.split(".")[0]
        for layer in model._flatten_layers()
        if isinstance(layer, tuple(getattr(keras.layers, name) for name in NAMES))
    }


def test_sparsify_reaches_all_layers_and_keeps_the_weights():
    model = deep_model()
    x = normal(2, TIME, WIDTH)
    before = model(x).numpy()
    sparse = sa.sparsify(model, "local", local_attn_ctx=16, block_size=8)
    assert set(kinds(model).values()) == {"keras"} and len(kinds(model)) == 3
    assert set(kinds(sparse).values()) == {"sparse_attention"}
    for a, b in zip(model.get_weights(), sparse.get_weights()):
        assert_same_bits(a, b)
    with counted(fused=3):
        y = sparse(x).numpy()
    assert_same_bits(model(x).numpy(), before)
    assert np.abs(y - before).max() > 0.01
    far = x.copy()
    far[:, 0] = 9  # three layers reach back over 15 positions each
    a, b = (model_(np.stack([x[0], far[0]])).numpy() for model_ in (model, sparse))
    assert (a[0, -1] != a[1, -1]).any()
    assert (b[0, 0] != b[1, 0]).any()


def test_sparsify_dense_is_the_same_model_fused():
    def check(seed):
        model = deep_model(200 * seed)
        sparse = sa.sparsify(model)
        x = normal(2, TIME, WIDTH)
        with counted(fused=3):
            got = outputs_and_gradients(sparse, x)
        oracle = outputs_and_gradients(in_policy(model, "float64"), x)
        assert_as_close(got, oracle, outputs_and_gradients(model, x))

    check_twice_at_most(check)


def test_sparsify_where(tmp_path):
    model = deep_model()
    chosen = sa.sparsify(model, "all", where=lambda layer: layer.name == "outer")
    assert {n for n, room in kinds(chosen).items() if room != "keras"} == {"outer"}
    chosen.compile("sgd", "mse")
    x = normal(2, TIME, WIDTH)
    chosen.fit(x, x, verbose=0)
    chosen.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("outer").attn_mode == "all"
    assert_same_bits(loaded.predict(x, verbose=0), chosen.predict(x, verbose=0))


def test_sparsify_without_a_layer_to_change_is_an_error():
    with pytest.raises(ValueError, match="model must have a keras.layers.MultiHead"):
        sa.sparsify(keras.Sequential([keras.Input([3]), keras.layers.Dense(2)]), "all")
    with pytest.raises(ValueError, match="`where` chooses"):
        sa.sparsify(deep_model(), "all", where=lambda layer: False)
