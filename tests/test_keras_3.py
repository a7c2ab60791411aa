"""What Keras 3 alone has: policies, its own file format, symbolic shapes, XLA by itself."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_close, np_dtype
from keras_helpers import functional, layer_by_hand, normal
from tf_helpers import assert_same_bits, run_script

import sparse_attention as sa
from sparse_attention.keras import registration
from sparse_attention.native import loader

TIME, WIDTH = 40, 32


def attention(**options):
    return sa.SparseSelfAttention(
        4, attn_mode="local", local_attn_ctx=16, block_size=8, **options
    )


# ---- policies ----


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_policies_equal_the_oracle(dtype):
    layer = attention(dtype="mixed_" + dtype)
    model = functional(layer, TIME, WIDTH)
    x = normal(3, TIME, WIDTH)
    oracle, plain = (layer_by_hand(layer, x, x, name)[0] for name in ("float64", dtype))
    got = model(x).numpy()
    assert got.dtype == np_dtype(dtype)
    assert_close(got, oracle, plain, 2)
    assert {w.dtype for w in layer.weights} == {"float32"}
    model.compile("sgd", "mse")
    before = layer.get_weights()
    history = model.fit(x, x, epochs=2, verbose=0).history["loss"]
    assert history[1] < history[0]
    assert all((a != b).any() for a, b in zip(before, layer.get_weights()))


def test_a_policy_without_kernels_is_an_error():
    with pytest.raises(TypeError, match="q must be one of .* got float64"):
        attention(dtype="float64")(np.zeros([1, TIME, WIDTH]))


def test_a_quantized_model_leaves_the_layer_as_it_is(tmp_path):
    inputs = keras.Input([TIME, WIDTH])
    layer = attention()
    middle = layer(keras.layers.Dense(WIDTH)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(8)(middle))
    attend = keras.Model(inputs, layer(inputs))
    x = normal(2, TIME, WIDTH)
    before = attend.predict(x, verbose=0)
    with pytest.warns(UserWarning, match="sparse_attention's layers cannot be quantiz"):
        model.quantize("int8")
    assert_same_bits(attend.predict(x, verbose=0), before)
    dtypes = [weight.dtype for weight in model.weights]
    assert dtypes.count("int8") == 2
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_bits(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_the_layer_itself_is_not_quantized():
    layer = attention()
    layer.build([None, TIME, WIDTH])
    for part in (layer, layer.query):
        with pytest.raises(NotImplementedError, match="to 'int8' .*'mixed_bfloat16'"):
            part.quantize("int8")
    with pytest.raises(ValueError, match="without quantiz.* got 'int8_from_float32'"):
        attention(dtype="int8_from_float32")


# ---- files ----


LOAD = """
import importlib
import sys
for module in sys.argv[2:]:
    importlib.import_module(module)
import keras
import numpy as np
import tensorflow as tf
import sparse_attention as sa
sa.load_ops()
x, folder = np.load(sys.argv[1] + "/x.npy"), sys.argv[1] + "/"
loaded = keras.models.load_model(folder + "model.keras")
exported, saved = (tf.saved_model.load(folder + name) for name in ("exported", "saved"))
results = [loaded(x), exported.serve(x), saved.serve(x)]
np.save(folder + "y.npy", [y.numpy().view(np.uint16) for y in results])
"""


@pytest.mark.parametrize(
    "imports", [("sparse_attention", "keras"), ("keras", "sparse_attention")]
)
def test_files_give_the_same_bits_in_a_new_process(imports, tmp_path):
    """Keras' own file, its export, and TensorFlow's SavedModel of the model."""
    plan = sa.BlockMask(
        np.tri(5), lambda head, q_idx, kv_idx: (q_idx + kv_idx) % 3 > 0, 8
    )
    layer = sa.SparseSelfAttention(4, block_mask=plan, dtype="mixed_bfloat16")
    model = functional(layer, TIME, WIDTH)
    x = normal(2, TIME, WIDTH)
    np.save(tmp_path / "x.npy", x)
    model.save(tmp_path / "model.keras")
    model.export(str(tmp_path / "exported"), verbose=False)
    model.serve = tf.function(lambda x: model(x), [tf.TensorSpec([None, TIME, WIDTH])])
    tf.saved_model.save(model, str(tmp_path / "saved"))
    run_script(LOAD, tmp_path, *imports)
    expected = model(x).numpy().view(np.uint16)
    for got in np.load(tmp_path / "y.npy"):
        assert_same_bits(got, expected)


LOAD_MODEL = """
import sys
import sparse_attention
assert not {"keras", "tensorflow"} & set(sys.modules)
import keras
assert "sparse_attention.keras.layers" not in sys.modules
model = keras.models.load_model(sys.argv[1])
print(type(model).__name__, type(model.optimizer).__name__)
"""


def test_a_model_and_its_optimizer_load_without_being_named(tmp_path):
    model = sa.SparseTransformer(20, 32, 1, 16, 2, "all", 8, 8)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    tokens = np.zeros([2, 32], np.int32)
    model.fit(tokens, tokens, verbose=0)
    model.save(tmp_path / "model.keras")
    printed = run_script(LOAD_MODEL, tmp_path / "model.keras")
    assert printed == "SparseTransformer Adam\n"


def test_all_that_is_registered_has_a_stand_in():
    classes = {f"sparse_attention>{name}": getattr(sa, name) for name in sa.__all__}
    registered = keras.utils.get_custom_objects()
    ours = {k: v for k, v in registered.items() if k.startswith("sparse_attention>")}
    # The Adam that there was before stands for Keras's.
    assert ours.pop("sparse_attention>Adam") is keras.optimizers.Adam
    assert set(ours) == {f"sparse_attention>{name}" for name in registration.CLASSES}
    assert all(classes[name] is cls for name, cls in ours.items())


# ---- symbolic shapes ----


@pytest.mark.parametrize("batch", [None, 3])
def test_shapes_are_known_before_anything_runs(batch):
    layer = attention(head_dim=16, dtype="mixed_float16")
    x = keras.KerasTensor([batch, TIME, WIDTH])
    for y in (layer.compute_output_spec(x), layer(x)):
        assert (y.shape, y.dtype) == ((batch, TIME, WIDTH), "float16")


# ---- XLA ----


def compiled(layer, jit_compile):
    model = functional(layer, TIME, WIDTH)
    model.compile("sgd", "mse", jit_compile=jit_compile)
    return model


def test_keras_turns_xla_on_where_it_sees_a_gpu(monkeypatch):
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    assert not compiled(attention(), "auto").jit_compile
    with monkeypatch.context() as patch:
        patch.setattr(tf.config, "list_physical_devices", lambda *_: [gpu])
        model = compiled(attention(), "auto")
        assert model.jit_compile
    x = normal(2, TIME, WIDTH)
    model.fit(x, x, verbose=0)


def test_who_asks_for_xla_where_it_cannot_be_had_is_told_and_trains_without(
    monkeypatch,
):
    why_not = loader.Loaded(None, "a test")
    monkeypatch.setitem(loader._loaded, "attention_xla", why_not)
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        model = compiled(attention(), True)
    x = normal(2, TIME, WIDTH)
    model.fit(x, x, verbose=0)


# ---- without Keras ----


WITHOUT_KERAS = """
import sys
if sys.argv[1:] == ["hidden"]:
    sys.modules["keras"] = None
import numpy as np
import sparse_attention as sa
x = np.zeros([1, 32, 32], np.float32)
print(sa.blocksparse_attention_impl(x, x, x, 4, "all").shape)
for name in ("SparseSelfAttention", "SparseTransformer"):
    try:
        getattr(sa, name)
    except ImportError as error:
        print(error)
"""


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        (["hidden"], {}, "need Keras, .*pip install keras`$"),
        (
            ["hidden"],
            {"TF_USE_LEGACY_KERAS": "1"},
            "need Keras, .*pip install tf_keras`, or unset .* TF_USE_LEGACY_KERAS$",
        ),
        (
            ["hidden"],
            {"KERAS_BACKEND": "torch"},
            "need Keras, .*; unset .* KERAS_BACKEND, or set it to 'tensorflow'$",
        ),
        ([], {"KERAS_BACKEND": "numpy"}, "need Keras.*KERAS_BACKEND"),
    ],
)
def test_all_but_layers_work_without_keras(arguments, environment, message):
    first, *errors = run_script(WITHOUT_KERAS, *arguments, **environment).splitlines()
    assert first == "(1, 32, 32)"
    assert len(errors) == 2 and all(re.search(message, error) for error in errors)
