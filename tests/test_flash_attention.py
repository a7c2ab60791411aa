"""`sa.flash_attention`: Keras's own attention by the fused op, and Keras as it was after."""

import sys
import threading
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from flash_helpers import assert_as_close, counted, in_policy, outputs_and_gradients
from helpers import assert_attention_close, assert_close, random_inputs
from keras_helpers import normal
from tf_helpers import TWO_CPUS, assert_same_bits, run_script

import sparse_attention as sa
from sparse_attention.keras import backend, flash_attention, registration
from sparse_attention.native import loader
from sparse_attention.plan.masks import causal_mask

nn = sys.modules["keras.src.backend.tensorflow.nn"]
KERAS_FUNCTION = nn.dot_product_attention
LAYER_CLASSES = keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention
KERAS_METHODS = [cls._compute_attention for cls in LAYER_CLASSES]


@pytest.fixture(autouse=True)
def off_afterwards():
    yield
    sa.disable_flash_attention()
    assert_off()


def assert_off():
    assert nn.dot_product_attention is KERAS_FUNCTION
    assert [cls._compute_attention for cls in LAYER_CLASSES] == KERAS_METHODS


def attend(q, k, v, **options):
    return keras.ops.dot_product_attention(q, k, v, **options)


# ---- numbers ----


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"q_len": 1},
        {"q_len": 70, "kv_len": 33},
        {"q_len": 33, "kv_len": 70},
        {"q_len": 128, "heads": 4, "kv_heads": 2},
        {"heads": 4, "kv_heads": 1},
        {"head_dim": 12},
        {"head_dim": 3, "head_dim_v": 40},
        {"dtype": "float16"},
        {"dtype": "bfloat16", "head_dim": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mode", ["eager", "function", "compiled"])
def test_the_function_equals_the_oracle(shape, is_causal, mode):
    inputs = random_inputs(0, **shape)._replace(dlse=None)

    def call(q, k, v, do):
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            o = attend(q, k, v, is_causal=is_causal, scale=0.3)
        return [o, *tape.gradient(o, [q, k, v], do)]

    if mode != "eager":
        call = tf.function(call, jit_compile=mode == "compiled")
    with sa.flash_attention(), counted(fused=1):
        results = call(*map(tf.constant, inputs[:4]))
    results = {name: x.numpy() for name, x in zip(("o", "dq", "dk", "dv"), results)}
    mask = np.ones([1, inputs.q.shape[1], inputs.k.shape[1]], bool)
    mask = np.tril(mask) if is_causal else mask
    assert_attention_close(results, inputs, mask, softmax_scale=0.3)


def test_without_a_scale_it_is_that_of_the_head_dim_before_padding():
    inputs = random_inputs(0, head_dim=12)._replace(dlse=None)
    with sa.flash_attention(), counted(fused=1):
        o = attend(*inputs[:3]).numpy()
    assert_attention_close({"o": o}, inputs, np.ones([1, 48, 48], bool))


@pytest.mark.parametrize("scale", [0.3, np.float32(0.3), np.array(0.3)], ids=repr)
def test_a_scale_may_be_any_number(scale):
    q, k, v = random_inputs(0)[:3]
    with sa.flash_attention(), counted(fused=1):
        got = attend(q, k, v, scale=scale)
    assert_same_bits(got.numpy(), _fused(q, k, v, np.float32(scale)).numpy())


def _fused(q, k, v, scale):
    plan = sa.BlockMask(np.ones([1, 1]), block_size=64, q_len=48, kv_len=48)
    q, k, v = (tf.reshape(x, [2, 48, 32]) for x in (q, k, v))
    o = sa.block_sparse_attention(q, k, v, plan, 2, softmax_scale=float(scale))
    return tf.reshape(o, [2, 48, 2, 16])


def test_dtypes_that_differ_are_promoted_as_keras_does():
    q, k, v = random_inputs(0)[:3]
    mixed = tf.constant(q), tf.cast(k, tf.bfloat16), tf.cast(v, tf.bfloat16)
    with sa.flash_attention(), counted(fused=1):
        got = attend(*mixed)
    # Before 3.11 Keras's own attention does not take such inputs, but has the rule.
    assert got.dtype == keras.backend.result_type("float32", "bfloat16") == "float32"
    rounded = [q, mixed[1].numpy(), mixed[2].numpy()]
    inputs = random_inputs(0)._replace(dlse=None)
    inputs = inputs._replace(**dict(zip("qkv", map(np.float32, rounded))))
    assert_attention_close({"o": got.numpy()}, inputs, np.ones([1, 48, 48], bool))


@pytest.mark.parametrize("mode", ["eager", "function", "compiled"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 48, 48), (2, 1, 1, 48), (2, 4, 48, 1), (2, 4, 48, 48), (48, 48)]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_masks_of_any_broadcast_shape_equal_the_oracle(shape, is_causal, mode):
    inputs = random_inputs(0, heads=4, kv_heads=2)._replace(dlse=None)
    mask = np.random.RandomState(1).random_sample(shape) < 0.8
    if shape[-1] > 1:
        mask[..., 0] = True  # Keras gives rows without a key the mean of all values

    def call(q, k, v, do, mask):
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            o = attend(q, k, v, mask=mask, is_causal=is_causal)
        return [o, *tape.gradient(o, [q, k, v], do)]

    if mode != "eager":
        call = tf.function(call, jit_compile=mode == "compiled")
    with sa.flash_attention(), counted(fused=1):
        results = call(*map(tf.constant, inputs[:4]), tf.constant(mask))
    results = {name: x.numpy() for name, x in zip(("o", "dq", "dk", "dv"), results)}
    allowed = np.broadcast_to(mask, [2, 4, 48, 48])
    allowed = np.tril(allowed) if is_causal else allowed
    assert_attention_close(results, inputs, allowed)


def test_a_scale_may_be_a_tensor_that_is_trained():
    q, k, v = map(tf.constant, random_inputs(0)[:3])
    scale = tf.Variable(0.3)

    @tf.function
    def call():
        with tf.GradientTape() as tape:
            o = attend(q, k, v, scale=scale + 0.0)
            loss = tf.reduce_sum(o**2)
        return o, tape.gradient(loss, scale)

    plain = call()
    with sa.flash_attention(), counted(fused=1):
        got = tf.function(call.python_function)()
    for a, b in zip(got, plain):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


# ---- what stays with Keras ----

SHAPE = [2, 48, 4, 16]
OUTSIDE = {
    "bias": ({"bias": np.ones([1, 1, 48, 48], "float32")}, "takes no bias"),
    "flash_attention": ({"flash_attention": False}, None),
    "float64": ({"dtype": "float64"}, "the dtype is float64"),
    "head_dim": ({"shape": [1, 8, 1, 264]}, "head dim is above 256"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_other_calls_take_keras_path_and_say_why(case, monkeypatch, capfd):
    options, why = OUTSIDE[case]
    options = dict(options)
    shape = options.pop("shape", SHAPE)
    x = normal(*shape).astype(options.pop("dtype", "float32"))
    plain = attend(x, x, x, **options)
    monkeypatch.setenv("SPARSE_ATTENTION_VERBOSE", "1")
    capfd.readouterr()
    with sa.flash_attention(), counted(keras=why is not None):
        got = attend(x, x, x, **options)
    assert_same_bits(got.numpy(), plain.numpy())
    said = capfd.readouterr().err
    assert (why or "") in said and bool(why) == ("runs by Keras" in said)


def test_lengths_that_only_a_run_can_tell_take_keras_path():
    unknown = tf.TensorSpec([None, None, 4, 16])
    x = normal(*SHAPE)
    with sa.flash_attention():
        with counted(keras=1):
            got = tf.function(attend, input_signature=[unknown] * 3)(x, x, x)
        with counted(fused=1):
            batches = tf.TensorSpec([None, 48, 4, 16])
            tf.function(attend, input_signature=[batches] * 3)(x, x, x)
    assert_same_bits(got.numpy(), attend(x, x, x).numpy())


@pytest.mark.parametrize("what", ["kernels", "xla"])
def test_without_kernels_keras_path_is_the_faster_one(what, monkeypatch):
    if what == "kernels":
        monkeypatch.setattr(loader, "attention_ops", lambda: None)
    else:
        monkeypatch.setattr(loader, "attention_xla", lambda: None)
    monkeypatch.setattr(loader, "why_not", lambda name: "no compiler")
    x = normal(*SHAPE)
    with sa.flash_attention(), counted(keras=1):
        tf.function(attend, jit_compile=what == "xla")(x, x, x)


def test_a_call_that_must_be_fused_is_an_error_where_it_cannot():
    x = normal(*SHAPE)
    with sa.flash_attention():
        with counted(fused=1):
            attend(x, x, x, flash_attention=True)
        with pytest.raises(
            ValueError, match="flash_attention=True cannot be had.*bias"
        ):
            attend(x, x, x, bias=OUTSIDE["bias"][0]["bias"], flash_attention=True)


def test_a_soft_cap_is_handed_on():
    q, k, v = map(tf.constant, random_inputs(0)[:3])
    with sa.flash_attention(), counted(fused=1):  # Keras's public function refuses it
        got = nn.dot_product_attention(q, k, v, attn_logits_soft_cap=0.5)
    s = tf.einsum("bqhd,bkhd->bhqk", q, k) / 4
    p = tf.nn.softmax(0.5 * tf.tanh(s / 0.5))
    want = tf.einsum("bhqk,bkhd->bqhd", p, v)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_wrong_shapes_get_keras_error():
    with sa.flash_attention(), pytest.raises(ValueError, match="only supports 4D"):
        attend(*[np.ones([2, 8, 16], "float32")] * 3)


# ---- layers and models ----


def model_of(name, **options):
    """One attention layer between two that are not; the same weights in every run."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input([40, 24])
    x = keras.layers.LayerNormalization()(inputs)
    if name == "MultiHeadAttention":
        layer = keras.layers.MultiHeadAttention(4, 8, value_dim=16, **options)
    else:
        layer = keras.layers.GroupQueryAttention(8, 4, 2, **options)
    x = keras.layers.Add()([inputs, layer(x, x, use_causal_mask=True)])
    return keras.Model(inputs, keras.layers.Dense(5)(x))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("name", ["MultiHeadAttention", "GroupQueryAttention"])
def test_layers_equal_those_without(name, policy):
    model = in_policy(model_of(name), policy)
    x = normal(3, 40, 24)
    plain = outputs_and_gradients(model, x)
    oracle = outputs_and_gradients(in_policy(model, "float64"), x)
    with sa.flash_attention(), counted(fused=1):
        got = outputs_and_gradients(model, x)
    assert_as_close(got, oracle, plain)
    assert any((a != b).any() for a, b in zip(got[1], plain[1]))


@pytest.mark.parametrize("name", ["MultiHeadAttention", "GroupQueryAttention"])
def test_layers_with_a_dropout_rate_are_fused(name):
    model = model_of(name, dropout=0.5)
    x = normal(3, 40, 24)
    plain = model(x).numpy()
    oracle = in_policy(model, "float64")(x).numpy()
    (layer,) = (x for x in model.layers if isinstance(x, LAYER_CLASSES))
    with sa.flash_attention():
        for call in ({}, {"training": False}):
            with counted(fused=1):
                assert_close(model(x, **call).numpy(), oracle, plain, 2)
        with counted(fused=2):
            dropped, again = (model(x, training=True).numpy() for _ in range(2))
        with counted(fused=1):
            zeros = layer(x, np.zeros_like(x), training=True)
        with counted(keras=1):
            scores = layer(x, x, return_attention_scores=True)[1]
    assert scores.shape == (3, 4, 40, 40)
    assert np.abs(plain - dropped).max() > 0.01
    assert np.abs(again - dropped).max() > 0.01
    assert np.abs(zeros).max() == 0  # no bias, no value


def test_dropout_is_at_keras_rate():
    """Of values of one, what is kept is divided by the rest of the rate: the mean is one."""
    layer = keras.layers.MultiHeadAttention(
        4, 8, dropout=0.25, value_dim=8, output_shape=8, use_bias=False
    )
    x = normal(8, 64, 16)
    layer.build(x.shape, x.shape)
    query, key = tf.zeros([8, 64, 4, 8]), tf.zeros([8, 64, 4, 8])
    value = tf.ones([8, 64, 4, 8])
    keras.utils.set_random_seed(0)
    with sa.flash_attention(), counted(fused=1):
        o, _ = layer._compute_attention(query, key, value, None, True)
    kept = np.round(o[..., 0].numpy() * 64 * 0.75)  # of 64 alike weights
    assert abs(kept.mean() - 48) < 0.5
    assert abs(kept.std() - (64 * 0.25 * 0.75) ** 0.5) < 0.3


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_and_predict(jit_compile):
    model = model_of("MultiHeadAttention")
    x, y = normal(6, 40, 24), normal(6, 40, 5)
    with sa.flash_attention():
        model.compile("sgd", "mse", jit_compile=jit_compile)
        with counted(fused=1):
            losses = model.fit(x, y, batch_size=3, epochs=3, verbose=0).history["loss"]
        with counted(fused=1):
            inside = model.predict(x, verbose=0)
    assert losses[2] < losses[0]
    with counted():  # the graph that was made inside goes on
        assert_same_bits(model.predict(x, verbose=0), inside)


MIRRORED = (
    TWO_CPUS
    + """
import keras, numpy as np, sparse_attention as sa
from sparse_attention.keras import flash_attention
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    x = inputs = keras.Input([32, 16])
    x = keras.layers.MultiHeadAttention(2, 8)(x, x)
    model = keras.Model(inputs, x)
    model.compile("sgd", "mse")
x = np.ones([4, 32, 16], "float32")
with sa.flash_attention():
    model.fit(x, x, verbose=0)
print(flash_attention._calls["fused"], flash_attention._calls["keras"])
"""
)


def test_the_threads_of_a_mirrored_strategy_see_it():
    fused, others = run_script(MIRRORED, sys.path[0]).split()
    assert int(fused) >= 2 and others == "0"


# ---- on and off ----


def is_fused():
    before = flash_attention._calls["fused"]
    x = normal(*SHAPE)
    attend(x, x, x)
    return flash_attention._calls["fused"] > before


def test_enable_and_disable():
    assert not is_fused()
    sa.enable_flash_attention()
    sa.enable_flash_attention()
    assert is_fused()
    sa.disable_flash_attention()
    assert_off()
    assert not is_fused()


def test_blocks_nest_and_end_with_an_error():
    with pytest.raises(KeyError), sa.flash_attention():
        with sa.flash_attention():
            assert is_fused()
        assert is_fused()
        raise KeyError
    assert_off()
    sa.enable_flash_attention()
    with sa.flash_attention():
        sa.disable_flash_attention()
        assert is_fused()
    assert_off()


def test_blocks_of_several_threads_overlap():
    entered, leave, errors = threading.Barrier(9), threading.Event(), []

    def hold():
        with sa.flash_attention():
            entered.wait()
            leave.wait()
            if not is_fused():
                errors.append("not fused")

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    entered.wait()
    assert is_fused()
    leave.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert_off()


def test_a_function_around_ours_stays_and_ours_is_inert(monkeypatch):
    with sa.flash_attention():
        ours = nn.dot_product_attention
        theirs = lambda *args, **kwargs: ours(*args, **kwargs)  # noqa: E731
        nn.dot_product_attention = theirs
        assert is_fused()
    try:
        assert nn.dot_product_attention is theirs
        assert not is_fused()
    finally:
        nn.dot_product_attention = KERAS_FUNCTION


@pytest.mark.parametrize("hook", flash_attention.HOOKS, ids=lambda hook: hook.module)
def test_a_keras_without_the_private_names_is_an_error_that_changes_nothing(
    hook, monkeypatch
):
    owner = flash_attention._owner(hook)
    with monkeypatch.context() as patch:
        patch.delattr(owner, hook.name)
        with pytest.raises(RuntimeError, match=f"cannot be switched on.*{hook.name}"):
            sa.enable_flash_attention()
        assert not flash_attention.is_on()
    assert_off()
    with monkeypatch.context() as patch:
        patch.setattr(owner, hook.name, lambda self, query, key: query)
        with pytest.raises(RuntimeError, match="has no argument .*value"):
            with sa.flash_attention():
                pass
        assert not flash_attention.is_on()


@pytest.mark.parametrize("version", ["2", "3.9.2"])
def test_an_older_keras_is_an_error(version, monkeypatch):
    monkeypatch.setattr(flash_attention, "VERSION", version)
    monkeypatch.setattr(flash_attention, "IS_KERAS_3", version.startswith("3"))
    for enable in (sa.enable_flash_attention, sa.flash_attention().__enter__):
        with pytest.raises(
            ImportError, match=f"needs Keras 3.10 .* got Keras {version}"
        ):
            enable()


def test_keras_is_the_one_that_tensorflow_has():
    assert backend.keras.layers.MultiHeadAttention is keras.layers.MultiHeadAttention


# ---- KerasHub, of which only names are needed here: make test-keras-hub has it all ----

HUB_FILES = {
    "__init__": "",
    "src/__init__": "",
    "src/utils/__init__": "",
    "src/utils/keras_utils": "def fused_attention_op_available():\n    return False\n",
    "src/model": "from keras_hub.src.utils.keras_utils import fused_attention_op_available",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Imports a package that asks as KerasHub does."""
    for name, text in HUB_FILES.items():
        path = tmp_path / "keras_hub" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))

    def load():
        return __import__("keras_hub.src.model", fromlist=["model"])

    yield load
    for name in [name for name in sys.modules if name.startswith("keras_hub")]:
        del sys.modules[name]


@pytest.mark.parametrize("when", ["before", "after"])
def test_keras_hub_is_told_that_there_is_a_fused_op(hub, when):
    if when == "before":
        model = hub()
        assert model.fused_attention_op_available() is False
    with sa.flash_attention():
        model = hub()
        assert model.fused_attention_op_available() is True
    assert model.fused_attention_op_available() is False
    assert not hasattr(model.fused_attention_op_available, "is_sparse_attentions")
    assert registration.HUB_MODULE in sys.modules


def test_a_keras_hub_without_the_question_is_left_alone(monkeypatch):
    module = types.ModuleType(registration.HUB_MODULE)
    monkeypatch.setitem(sys.modules, registration.HUB_MODULE, module)
    with sa.flash_attention():
        assert is_fused()
    assert vars(module).keys() == vars(types.ModuleType("any")).keys()


def test_plans_are_kept_for_the_last_lengths():
    sa.clear_plans()
    plan = flash_attention._plan(40, 50, True)
    assert flash_attention._plan(40, 50, True) is plan
    assert (plan.to_dense()[0] == causal_mask()(0, *np.ogrid[:40, :50])).all()
    for length in range(1, flash_attention.KEPT_PLANS + 1):
        flash_attention._plan(length, length, False)
    assert flash_attention._plan(40, 50, True) is not plan
