"""`sa.portable_graph`: graphs without our ops, and TensorFlow Lite's numbers beside ours."""

import threading
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from flash_helpers import counted
from helpers import PATTERNS, assert_attention_close, random_inputs
from keras_helpers import normal
from tf_helpers import assert_same_bits, merged, pattern

import sparse_attention as sa
from sparse_attention.native import loader
from sparse_attention.ops import portable


def ops_of(function, *arguments):
    """The types of a graph's ops, those of its functions included."""
    graph = tf.function(function).get_concrete_function(*arguments).graph
    definition = graph.as_graph_def()
    nodes = [
        *definition.node,
        *(n for f in definition.library.function for n in f.node_def),
    ]
    return {node.op for node in nodes}


def attend(x):
    return sa.block_sparse_attention(x, x, x, pattern("local"), 4, kv_lengths=[72, 50])


def test_graphs_inside_hold_none_of_our_ops(monkeypatch):
    x = normal(2, 72, 32)
    assert "BlockSparseAttention" in ops_of(attend, x)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")  # the user asked for it
        for name in ("attention_ops", "attention_xla", "why_not"):
            patch.setattr(loader, name, None)  # nothing is compiled or loaded
        with sa.portable_graph():
            assert not any("BlockSparse" in op for op in ops_of(attend, x))
    assert "BlockSparseAttention" in ops_of(attend, x)


def test_it_ends_with_the_block_and_holds_for_its_thread_alone():
    seen = []
    with pytest.raises(KeyError), sa.portable_graph():
        with sa.portable_graph():
            pass
        assert portable.is_on()
        thread = threading.Thread(target=lambda: seen.append(portable.is_on()))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == [False] and not portable.is_on()


def test_gradients_of_ops_made_outside_are_taken_inside():
    x = tf.constant(normal(2, 72, 32))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = attend(x)
    with sa.portable_graph():
        inside = tape.gradient(y, x)
    assert (inside.numpy() == tape.gradient(y, x).numpy()).all()


def test_the_three_ops_are_refused():
    """Each would be in the graph; their gradients outside of the block stay."""
    x = tf.constant(normal(1, 64, 32))
    three = sa.BlocksparseTransformer(np.ones([1, 2, 2], bool), block_size=32, heads=2)
    w = three.query_key_op(x, x)
    for call in (
        lambda: three.query_key_op(x, x),
        lambda: three.weight_value_op(w, x),
        lambda: three.tn_op(w, x),
        lambda: three.softmax(w),
        lambda: sa.blocksparse_attention_impl(
            *(x, x, x, 2, "all"), backend="blocksparse_ops"
        ),
    ):
        with sa.portable_graph(), pytest.raises(NotImplementedError, match="'fused'"):
            call()
        call()


def test_keras_own_layers_stay_with_keras():
    layer, x = keras.layers.MultiHeadAttention(4, 8), normal(2, 24, 16)
    plain = layer(x, x).numpy()
    with sa.flash_attention(), sa.portable_graph(), counted(keras=1):
        assert_same_bits(layer(x, x).numpy(), plain)


# ---- TensorFlow Lite ----


def in_tflite(content, *arrays):
    """What a TensorFlow Lite model gives."""
    interpreter = tf.lite.Interpreter(model_content=content)
    details = interpreter.get_input_details()
    for detail, array in zip(details, arrays):
        interpreter.resize_tensor_input(detail["index"], array.shape)
    interpreter.allocate_tensors()
    for detail, array in zip(details, arrays):
        interpreter.set_tensor(detail["index"], array)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


@pytest.mark.parametrize("attn_mode", PATTERNS)
def test_tflite_equals_the_oracle(attn_mode):
    inputs = random_inputs(0, q_len=72, heads=4)._replace(dlse=None)
    plan = pattern(attn_mode)

    def call(q, k, v):
        return sa.block_sparse_attention(q, k, v, plan, 4)

    arrays = [merged(x) for x in inputs[:3]]
    specs = [tf.TensorSpec([None, *x.shape[1:]]) for x in arrays]
    with sa.portable_graph():
        function = tf.function(call, input_signature=specs).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
    o = in_tflite(converter.convert(), *arrays).reshape(inputs.do.shape)
    assert_attention_close({"o": o}, inputs, plan.to_dense())


def every_layer(time=64, width=32):
    x = inputs = keras.Input([time, width])
    x = sa.SparseSelfAttention(4, attn_mode="local", local_attn_ctx=16, block_size=16)(
        x
    )
    x = sa.MultiHeadAttention(4, 8, attn_mode="fixed", local_attn_ctx=32)(x, x)
    x = sa.GroupQueryAttention(8, 4, 2)(x, x, use_causal_mask=True)
    x = keras.layers.MultiHeadAttention(4, 8)(x, x, use_causal_mask=True)
    return keras.Model(inputs, x)


@pytest.mark.parametrize("how", ["convert", "export"])
def test_keras_models_convert(how, tmp_path):
    keras.utils.set_random_seed(0)
    model, x = every_layer(), normal(3, 64, 32)
    path = tmp_path / "model.tflite"
    with sa.portable_graph(), sa.flash_attention():
        if how == "export":
            model.export(str(path), format="litert", verbose=False)
        else:
            converter = tf.lite.TFLiteConverter.from_keras_model(model)
            path.write_bytes(converter.convert())
    got, want = in_tflite(path.read_bytes(), x), model(x).numpy()
    # Four layers one behind the other; a layer alone is held to the oracle above.
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_a_language_model_converts():
    keras.utils.set_random_seed(0)
    model = sa.SparseTransformer(50, time=32, layers=2, width=16, heads=2)
    tokens = np.random.RandomState(0).randint(0, 50, [2, 32]).astype(np.int32)
    want = model(tokens).numpy()
    spec = tf.TensorSpec([None, 32], tf.int32)
    with sa.portable_graph():
        call = tf.function(lambda tokens: model(tokens), input_signature=[spec])
        function = call.get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
    got = in_tflite(converter.convert(), tokens)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
