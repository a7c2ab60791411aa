"""Decoding against the whole model; sampling; what a step reads."""

import doctest
import functools
import gc
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import weakref

import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_close
from keras_helpers import model_by_hand

import sparse_attention as sa
from sparse_attention.keras import generation
from sparse_attention.plan.reference import attention_fwd

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATTERNS = ("all", "local", "strided", "fixed")
MODELS = (*PATTERNS, "local,strided", "any")
VOCAB, TIME, PROMPT = 40, 72, 21

# Plans with a row_stride, whose queries have 0 to 54 keys; in one, heads differ.
RAGGED, SHARED = (
    sa.BlockMask(
        np.random.RandomState(heads).random_sample([heads, 10, 10]) < 0.4,
        sa.causal_mask(),
        block_size=8,
        q_len=TIME,
        kv_len=TIME,
        row_stride=5,
    )
    for heads in (4, 1)
)


@functools.lru_cache(maxsize=None)
def model_of(attention="fixed", dtype="float32"):
    """A model whose every layer matters, so that tokens differ.

    Args:
      attention: As for the model, or "any": plans that are no pattern, heads that share
        keys.
    """
    tf.keras.utils.set_random_seed(0)
    model = sa.SparseTransformer(
        vocab_size=VOCAB,
        time=TIME,
        layers=2,
        width=32,
        heads=4,
        attention="all" if attention == "any" else attention,
        local_attn_ctx=32,
        block_size=8,
        dtype=dtype,
    )
    if attention == "any":
        for block, plan in zip(model.blocks, (RAGGED, SHARED)):
            block.attention = sa.SparseSelfAttention(4, kv_heads=2, block_mask=plan)
    model.build([None, TIME])
    random = np.random.RandomState(0)
    for weight in model.trainable_weights:
        scale = 2 * weight.shape[0] ** -0.5
        weight.assign(weight + scale * random.standard_normal(weight.shape))
    return model


def tokens_of(time=TIME):
    return np.random.RandomState(1).randint(0, VOCAB, [2, time])


def steps(model, tokens, first):
    """Logits of the positions from `first` on, [batch, time - first, vocab_size]."""
    decoder = sa.Decoder(model, len(tokens))
    decoder.prefill(tokens[:, :first])
    columns = enumerate(tokens.T[first:], first)
    return np.stack([decoder.step(column, i) for i, column in columns], axis=1)


def dense_mask(block):
    """bool [4 heads, TIME, TIME]"""
    return np.broadcast_to(block.attention.block_mask.to_dense(), [4, TIME, TIME])


# ---- the same as the whole model ----


@pytest.mark.parametrize("prompt_len", [1, PROMPT])
@pytest.mark.parametrize("attention", PATTERNS)
def test_greedy_tokens_are_those_of_the_whole_model(attention, prompt_len):
    model, prompt = model_of(attention), tokens_of(prompt_len)
    got, _ = sa.generate(model, prompt, TIME - prompt_len, temperature=0)
    assert got.dtype == np.int32
    assert len(np.unique(got)) > 5  # it does not repeat itself
    tokens = np.concatenate([prompt, got], axis=1)
    want = np.argmax(model(tokens), axis=2)[:, prompt_len - 1 : -1]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "attention, dtype",
    [*((attention, "float32") for attention in MODELS), ("fixed", "mixed_bfloat16")],
)
def test_logits_match_the_oracle(attention, dtype):
    model, tokens = model_of(attention, dtype), tokens_of()
    got = steps(model, tokens, PROMPT)
    want = model_by_hand(model, tokens, np.float64, attention_fwd)[:, PROMPT:]
    whole = model(tokens).numpy()[:, PROMPT:]  # may be off by half as much
    assert_close(got, want, whole, 2)


# ---- what a step reads ----


@pytest.mark.parametrize("attention", MODELS)
def test_a_step_reads_no_key_that_the_pattern_forbids(attention):
    model, tokens = model_of(attention), tokens_of()
    decoder = sa.Decoder(model, 2)
    decoder.prefill(tokens)
    for position in range(0, TIME, 7):
        whole = [[x.numpy() for x in caches] for caches in decoder._caches]
        want = decoder.step(tokens[:, position], position)
        for block, caches, arrays in zip(model.blocks, decoder._caches, whole):
            kv_heads = block.attention.kv_heads
            attends = dense_mask(block)[:, position].reshape(kv_heads, -1, TIME)
            attends = attends.any(axis=1)[:, :, None]
            for cache, array in zip(caches, arrays):
                array = array.reshape(2, kv_heads, TIME, -1)
                cache.assign(np.where(attends, array, np.nan).reshape(cache.shape))
        got = decoder.step(tokens[:, position], position)
        np.testing.assert_array_equal(got, want)
        for caches, arrays in zip(decoder._caches, whole):
            for cache, array in zip(caches, arrays):
                cache.assign(array)


@pytest.mark.parametrize("attention", MODELS[:-1])
def test_bytes_are_those_of_the_keys_that_the_pattern_allows(attention):
    model, length = model_of(attention), TIME - PROMPT
    _, statistics = sa.generate(model, tokens_of(PROMPT), length)
    rows = slice(PROMPT - 1, TIME - 1)
    keys = [dense_mask(block)[:, rows] for block in model.blocks]
    key_bytes = 2 * 8 * 4  # k and v, head_dim, float32
    assert statistics.bytes_per_token == np.sum(keys) * key_bytes / length
    dense = 2 * 4 * sum(range(PROMPT, TIME)) * key_bytes / length
    assert statistics.dense_bytes_per_token == dense
    assert statistics.seconds_per_token > 0


def traces(model, batch):
    """How often TensorFlow has traced a step for so many sequences."""
    graph = generation._network_of(model, batch).graph
    return graph.experimental_get_tracing_count()


def test_steps_are_traced_once_for_all_calls():
    model = model_of.__wrapped__()  # one of its own
    for _ in range(2):
        decoder = sa.Decoder(model, 1)
        for position in range(0, TIME, 8):
            decoder.step([3], position)
        sa.generate(model, [[1, 2, 3]], 5)
    assert traces(model, 1) == 1


def test_a_call_does_not_see_the_keys_of_another():
    model, tokens = model_of(), tokens_of()
    want = steps(model_of.__wrapped__(), tokens, 0)
    decoders = [sa.Decoder(model, 2) for _ in "ab"]
    for position, column in enumerate(tokens.T[:10]):
        for decoder, shown in zip(decoders, (column, column[::-1])):
            got = decoder.step(shown, position).numpy()
        np.testing.assert_array_equal(got[::-1], want[:, position])


def test_other_weights_or_plans_are_traced_anew():
    model, prompt = model_of.__wrapped__("all"), tokens_of(PROMPT)
    sa.generate(model, prompt, 5, temperature=0)
    model.token_embedding.enable_lora(2)
    model.token_embedding.lora_embeddings_a.assign(np.ones([VOCAB, 2]))
    model.token_embedding.lora_embeddings_b.assign(np.ones([2, 32]) * np.arange(32))
    model.blocks[0].attention.block_mask = (
        model_of("local").blocks[0].attention.block_mask
    )
    got, _ = sa.generate(model, prompt, 5, temperature=0)
    tokens = np.concatenate([prompt, got], axis=1)
    want = np.argmax(model(np.pad(tokens, [(0, 0), (0, TIME - PROMPT - 5)])), axis=2)
    np.testing.assert_array_equal(got, want[:, PROMPT - 1 : PROMPT + 4])


def test_few_traces_are_kept_and_end_with_the_model():
    model = model_of.__wrapped__()
    for batch in range(1, generation.KEPT_NETWORKS + 3):
        cache = weakref.ref(sa.Decoder(model, batch)._caches[0][0])
    kept = vars(model)["_decoding_networks"].values()
    assert [network.batch for network, _ in kept] == [3, 4, 5, 6]
    gc.collect()
    assert cache() is None
    model, kept = weakref.ref(model), None
    gc.collect()
    assert model() is None


def test_benchmark_prints_what_a_token_costs(capsys, monkeypatch):
    monkeypatch.syspath_prepend(os.path.join(ROOT, "benchmarks"))
    benchmark = importlib.import_module("generation")
    benchmark.main("--time 256 --layers 2 --width 64 --heads 4 --length 4".split())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    read = {attention: float(megabytes) for attention, _, megabytes in lines}
    key_bytes = 2 * 2 * 64 * 4  # of two layers: k and v, width, float32
    for attention, keys in ("all", 253.5), ("local", 128):
        assert read[attention] == round(keys * key_bytes / 1e6, 2)


# ---- sampling ----


def test_one_of_the_likeliest_is_greedy():
    model, prompt = model_of(), tokens_of(PROMPT)
    greedy, _ = sa.generate(model, prompt, 10, temperature=0)
    for options in {"top_k": 1, "temperature": 3.0}, {"temperature": 1e-6}:
        tokens, _ = sa.generate(model, prompt, 10, **options)
        np.testing.assert_array_equal(tokens, greedy)


def test_a_seed_repeats_the_tokens():
    model, prompt = model_of(), tokens_of(PROMPT)
    first, again, other = (
        sa.generate(model, prompt, 20, temperature=5.0, seed=seed)[0]
        for seed in (7, 7, 8)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (2.0, 3)])
def test_tokens_are_drawn_from_the_softmax(temperature, top_k):
    logits = np.array([1.0, -2.0, 0.5, 3.0, 0.0], np.float32)
    draws, random = 40000, np.random.RandomState(0)
    tokens = generation._sample(np.tile(logits, [draws, 1]), temperature, top_k, random)
    p = np.exp(logits / temperature)
    if top_k is not None:
        p[np.argsort(p)[:-top_k]] = 0
    p /= p.sum()
    got = np.bincount(tokens, minlength=len(p)) / draws
    assert (np.abs(got - p) <= 4 * np.sqrt(p * (1 - p) / draws)).all()


def test_tokens_are_handed_out_as_they_come():
    steps = []
    tokens, _ = sa.generate(model_of(), tokens_of(PROMPT), 6, on_token=steps.append)
    np.testing.assert_array_equal(np.stack(steps, axis=1), tokens)


def test_documentation_examples():
    assert doctest.testmod(generation).attempted
    assert not doctest.testmod(generation).failed


# ---- errors ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt": np.zeros([1, 0], int)}, r"prompt must be .* got shape \(1, 0\)"),
        ({"prompt": np.zeros([5], int)}, r"prompt must be .* got shape \(5,\)"),
        (
            {"prompt": [[0, VOCAB]]},
            r"prompt must be in \[0, vocab_size=40\), got 0 to 40",
        ),
        ({"prompt": [[-1, 0]]}, "prompt must be in .*, got -1 to 0"),
        ({"length": 0}, "length must be a positive integer, got 0"),
        ({"length": TIME}, r"at most time=72 together, got 2 \+ 72"),
        ({"temperature": -0.5}, "temperature must be finite and >= 0, got -0.5"),
        ({"temperature": np.nan}, "temperature must be finite and >= 0, got nan"),
        ({"top_k": 0}, "top_k must be a positive integer, got 0"),
    ],
)
def test_generate_names_what_does_not_fit(options, message):
    arguments = dict({"prompt": [[1, 2]], "length": 4}, **options)
    with pytest.raises(ValueError, match=message):
        sa.generate(model_of(), **arguments)


def test_generate_wants_integers():
    with pytest.raises(TypeError, match="prompt must hold integers, got float64"):
        sa.generate(model_of(), [[1.0]], 4)


# ---- the example ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of train_lm.py, small."""
    output = tmp_path_factory.mktemp("train_lm")
    options = "--time 128 --layers 1 --width 32 --steps 2 --steps-per-epoch 2 --batch 1"
    run_example(
        "train_lm.py", "--output", output, "--eval-batches", 1, *options.split()
    )
    return output / "fixed"


def run_example(name, *arguments):
    """What it prints."""
    command = [sys.executable, os.path.join(ROOT, "examples", name)]
    ran = subprocess.run(
        command + list(map(str, arguments)),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": ROOT, "PYTHONIOENCODING": "utf-8"},
    )
    assert ran.returncode == 0, ran.stderr.decode()[-3000:]
    return ran.stdout.decode()


def test_example_continues_a_prompt(trained):
    arguments = "--prompt été --length 20 --top-k 200 --seed 1".split()
    printed = run_example("generate.py", trained, *arguments)
    assert printed.startswith("été")
    text, cost = printed.rsplit("\n\n", 1)
    assert len(text.encode()) > len("été".encode())
    assert re.match(r"\d+\.\d\d ms a byte of text; read 0.\d+ MB .* dense", cost)


@pytest.fixture
def example(monkeypatch, capsys):
    monkeypatch.syspath_prepend(os.path.join(ROOT, "examples"))
    main = importlib.import_module("generate").main

    def refusal(*arguments):
        with pytest.raises(SystemExit):
            main(list(map(str, arguments)))
        printed = capsys.readouterr()
        assert not printed.out
        return printed.err

    return refusal


def test_example_names_what_does_not_fit(trained, example, tmp_path):
    assert "must hold a run of train_lm.py, has no config.json" in example(tmp_path)
    assert "at most time=128 together, got 7 + 122" in example(trained, "--length", 122)
    assert "prompt must be" in example(trained, "--prompt", "")
    config = json.loads((trained / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "has no checkpoint.weights.h5" in example(tmp_path)
    config["model"]["width"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(trained / "checkpoint.weights.h5", tmp_path)
    assert "holds a model of another configuration" in example(tmp_path)


@pytest.mark.parametrize("temperature", [0, 1])
def test_nan_is_no_token(temperature):
    model = model_of.__wrapped__()  # one of its own
    model.set_weights([np.full(w.shape, np.nan) for w in model.get_weights()])
    with pytest.raises(ValueError, match="logits must be numbers.*got NaN"):
        sa.generate(model, [[1, 2]], length=3, temperature=temperature)
