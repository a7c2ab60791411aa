"""KerasHub's models with flash attention on and off: `make test-keras-hub`.

The file is collected only when it is named: KerasHub has an environment of its own.
"""

import importlib
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import keras
import numpy as np
import pytest
from architectures import ARCHITECTURES, tokens
from flash_helpers import assert_as_close, counted, in_policy, outputs_and_gradients
from tf_helpers import assert_same_bits

import sparse_attention as sa
from sparse_attention.keras import flash_attention

LANGUAGE_MODELS = [name for name, a in ARCHITECTURES.items() if a.causal_lm]


def backbone(name):
    keras.utils.set_random_seed(0)
    architecture = ARCHITECTURES[name]
    return architecture.backbone(**architecture.config)


def paths(name):
    return {"fused": ARCHITECTURES[name].fused}


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_gradients_equal_those_without(name, policy):
    model, x = in_policy(backbone(name), policy), ARCHITECTURES[name].inputs
    plain = outputs_and_gradients(model, x)
    oracle = outputs_and_gradients(in_policy(model, "float64"), x)
    with sa.flash_attention(), counted(**paths(name)):
        got = outputs_and_gradients(model, x)
    assert_as_close(got, oracle, plain)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_generate_and_fit(name):
    model = ARCHITECTURES[name].causal_lm(backbone=backbone(name))
    model.compile("sgd", "sparse_categorical_crossentropy", sampler="greedy")
    prompts = tokens(20, 20)
    prompts["padding_mask"][:, 12:] = 0
    plain = model.generate(prompts, stop_token_ids=None)
    x, y = tokens(), tokens()["token_ids"]
    with sa.flash_attention():
        model.compile("sgd", "sparse_categorical_crossentropy", sampler="greedy")
        got = model.generate(prompts, stop_token_ids=None)
        loss = model.fit(x, y, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(loss).all()
    for key in plain:
        np.testing.assert_array_equal(got[key], plain[key])
    assert (got["token_ids"][:, :12] == prompts["token_ids"][:, :12]).all()


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_a_saved_model_is_the_same_on_and_off(name, tmp_path):
    model, x = backbone(name), ARCHITECTURES[name].inputs
    with sa.flash_attention():
        inside = model.predict(x, verbose=0)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        with counted(**paths(name)):
            again = loaded.predict(x, verbose=0)
    for a, b in zip(*map(keras.tree.flatten, (inside, again))):
        assert_same_bits(a, b)
    off = keras.models.load_model(tmp_path / "model.keras")
    with counted():
        off.predict(x, verbose=0)


def test_keras_hub_asks_as_it_did_afterwards():
    import keras_hub.src.models.llama.llama_attention as llama
    from keras_hub.src.utils import keras_utils

    original = keras_utils.fused_attention_op_available
    with sa.flash_attention():
        assert llama.fused_attention_op_available is not original
        assert llama.fused_attention_op_available() is True
    assert llama.fused_attention_op_available is original
    assert original() is False and not flash_attention.is_on()


def test_sparsify_makes_the_attention_of_encoders_sparse():
    """KerasHub's `TransformerEncoder` makes Keras's layer in its `build`."""
    model, x = backbone("vit"), ARCHITECTURES["vit"].inputs
    before = model(x).numpy()
    sparse = sa.sparsify(model, "local", local_attn_ctx=4, block_size=8)
    with counted(fused=2):
        assert np.abs(sparse(x).numpy() - before).max() > 1e-3
    assert_same_bits(model(x).numpy(), before)


def test_the_benchmark_times_both_models_off_and_on(tmp_path, monkeypatch):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    monkeypatch.syspath_prepend(os.path.join(root, "benchmarks"))
    benchmark = importlib.import_module("keras_hub_models")
    out = tmp_path / "rows.json"
    small = "--lengths 32 --tokens 64 --layers 1 --steps 1 --policies float32".split()
    rows = benchmark.main([*small, "--out", str(out)])
    assert [(row["model"], row["flash"]) for row in rows] == [
        *(("gpt2", "off"), ("gpt2", "on"), ("llama", "off"), ("llama", "on"))
    ]
    assert all(row["ms"] > 0 and row["batch"] == 2 for row in rows)
    assert json.loads(out.read_text())["rows"] == rows
