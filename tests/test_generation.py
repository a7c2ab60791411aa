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
from sparse_attention.keras.score_options import SCORE_OPTIONS
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
def model_of(attention="fixed", dtype="float32", **options):
    """A model whose every layer matters, so that tokens differ.

    Args:
      attention: As for the model, or "any": plans that are no pattern, heads that share
        keys.
      **options: Others of the model.
    """
    tf.keras.utils.set_random_seed(0)
    sizes = {"time": TIME, "local_attn_ctx": 32, "block_size": 8}
    model = sa.SparseTransformer(
        vocab_size=VOCAB,
        layers=2,
        width=32,
        heads=4,
        attention="all" if attention == "any" else attention,
        dtype=dtype,
        **{**sizes, **options},
    )
    if attention == "any":
        for block, plan in zip(model.blocks, (RAGGED, SHARED)):
            own = {name: options[name] for name in SCORE_OPTIONS if name in options}
            block.attention = sa.SparseSelfAttention(
                4, kv_heads=2, block_mask=plan, dtype=dtype, **own
            )
    model.build([None, model.time])
    random = np.random.RandomState(0)
    for weight in model.trainable_weights:
        scale = 2 * weight.shape[0] ** -0.5
        weight.assign(weight + scale * random.standard_normal(weight.shape))
    return model


def tokens_of(time=TIME):
    return np.random.RandomState(1).randint(0, VOCAB, [2, time])


def steps(model, tokens, first, segment_ids=None):
    """Logits of the positions from `first` on, [batch, time - first, vocab_size]."""
    decoder = sa.Decoder(model, len(tokens))
    decoder.prefill(tokens[:, :first], segment_ids)
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


def test_the_last_token_may_be_one_that_no_position_reads():
    model, prompt = model_of("local,strided"), tokens_of(1)
    got, _ = sa.generate(model, prompt, TIME, temperature=0)
    tokens = np.concatenate([prompt, got[:, :-1]], axis=1)
    np.testing.assert_array_equal(got, np.argmax(model(tokens), axis=2))
    again, _ = sa.generate(model, tokens, 1, temperature=0)
    np.testing.assert_array_equal(again, got[:, -1:])


# ---- prompts of different lengths ----

LENGTHS = 13, 1, 40, 32, 13


def prompts_of(lengths):
    random = np.random.RandomState(2)
    return [random.randint(0, VOCAB, length).tolist() for length in lengths]


def assert_are_of_the_whole_model(model, prompts, tokens, segment_ids=None):
    """Every row of `tokens` must be what the model finds likeliest after its prefix."""
    whole, length = np.zeros([len(prompts), model.time], np.int32), tokens.shape[1]
    for row, prompt, own in zip(whole, prompts, tokens):
        row[: len(prompt) + length] = [*prompt, *own]
    likeliest = np.argmax(model(whole, segment_ids=segment_ids), axis=2)
    for row, prompt, own in zip(likeliest, prompts, tokens):
        np.testing.assert_array_equal(own, row[len(prompt) - 1 :][:length])


@pytest.mark.parametrize(
    "attention, options",
    [
        *((attention, {}) for attention in MODELS),
        ("fixed", {"block_size": 16, "time": 64}),
        ("local,strided", {"local_attn_ctx": 16, "block_size": 16, "time": 55}),
    ],
)
def test_a_prompt_is_continued_as_it_is_alone(attention, options):
    model, prompts = model_of(attention, **options), prompts_of(LENGTHS)
    length = model.time - max(LENGTHS)
    tokens, statistics = sa.generate(model, prompts, length, temperature=0)
    assert len(np.unique(tokens)) > 5
    assert statistics.lengths.tolist() == [length] * len(prompts)
    assert_are_of_the_whole_model(model, prompts, tokens)
    for prompt, own in zip(prompts, tokens):
        alone, _ = sa.generate(model, [prompt], length, temperature=0)
        np.testing.assert_array_equal(own, alone[0])


def test_prompts_may_be_ragged_or_come_with_their_lengths():
    model, prompts = model_of(), prompts_of(LENGTHS)
    want, _ = sa.generate(model, prompts, 8, temperature=0)
    ragged = tf.ragged.constant(prompts)
    padded = ragged.to_tensor(-1).numpy()
    for prompt, lengths in [
        (ragged, None),
        (list(map(np.array, prompts)), None),
        (tuple(map(tuple, prompts)), LENGTHS),
        (padded, LENGTHS),
        (tf.constant(padded), tf.constant(LENGTHS)),
        (np.uint8(np.maximum(padded, 0)), np.array(LENGTHS, np.uint8)),
    ]:
        got, _ = sa.generate(model, prompt, 8, 0, prompt_lengths=lengths)
        np.testing.assert_array_equal(got, want)


def test_bytes_of_different_positions_are_those_of_the_longest_list():
    model = model_of("all")
    _, statistics = sa.generate(model, prompts_of([3, 9]), 2)
    key_bytes = 2 * 2 * 32 * 4  # of two layers: k and v, width, float32
    assert statistics.bytes_per_token == 9.5 * key_bytes
    assert statistics.dense_bytes_per_token == 6.5 * key_bytes


# ---- what stands between the scores and the softmax ----

SLOPES = 0.5, 0.0, -0.125, 1.0
# name: options of the model, and what they are for the reference
OPTIONS = {
    "dropout": ({"dropout": 0.5, "attention_dropout": 0.5}, {}),  # is for training
    "alibi": ({"alibi": SLOPES}, {"alibi_slopes": SLOPES}),
    "logit_softcap": ({"logit_softcap": 1.5}, {"logit_softcap": 1.5}),
    "sinks": ({"sinks": True}, {}),
    "relative_positions": ({"relative_positions": 9}, {}),
    "rotary": ({"rotary": True}, {"rotary": 10000.0}),
    "rotary_base": ({"rotary": 50.0}, {"rotary": 50.0}),
    "segment_ids": ({}, {}),
}


def random_ids(lengths):
    """Documents of 1 to 20 tokens for each prompt, some of them padding."""
    random = np.random.RandomState(3)
    ids = [random.permutation([0, 1, -1, 5]).repeat(11)[:n].tolist() for n in lengths]
    return [[*row[:-1], 2 if row[-1] < 0 else row[-1]] for row in ids]


def check_options(names, attention, dtype="float32"):
    """Tokens against the whole model, with prompts of all lengths; logits by hand."""
    options, rule = ({} for _ in "ab")
    for name in names:
        options.update(OPTIONS[name][0])
        rule.update(OPTIONS[name][1])
    model, prompts = model_of(attention, dtype, **options), prompts_of(LENGTHS)
    ids = whole_ids = step_ids = None
    if "segment_ids" in names:
        ids = random_ids(LENGTHS)
        whole_ids = np.array([row + [row[-1]] * (TIME - len(row)) for row in ids])
        step_ids = np.random.RandomState(4).randint(-1, 3, [2, TIME // 6]).repeat(6, 1)
        rule["segment_ids"] = step_ids, step_ids
    length = TIME - max(LENGTHS)
    if dtype == "float32":
        tokens, _ = sa.generate(model, prompts, length, 0, segment_ids=ids)
        assert len(np.unique(tokens)) >= 5
        assert_are_of_the_whole_model(model, prompts, tokens, whole_ids)
    tokens = tokens_of()
    got = steps(model, tokens, PROMPT, step_ids)
    want = model_by_hand(model, tokens, np.float64, attention_fwd, **rule)
    whole = model(tokens, segment_ids=step_ids).numpy()  # may be off by half as much
    assert_close(got, want[:, PROMPT:], whole[:, PROMPT:], 2)


@pytest.mark.parametrize("attention", ["local,strided", "any"])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_is_decoded(name, attention):
    check_options([name], attention)


@pytest.mark.parametrize(
    "attention, dtype",
    [*((attention, "float32") for attention in MODELS), ("any", "mixed_bfloat16")],
)
def test_all_options_are_decoded_together(attention, dtype):
    check_options([n for n in OPTIONS if n != "rotary_base"], attention, dtype)


def test_documents_are_not_read_by_others():
    model, tokens = model_of("all"), tokens_of()
    decoder, read = sa.Decoder(model, 2), []
    for ids in None, [[0] * 20 + [1] * 52, [0] * 52 + [1] * 20], None:
        decoder.prefill(tokens, None if ids is None else np.array(ids))
        decoder.step(tokens[:, 59], 59)
        read.append(decoder.bytes_read)
    assert np.array(read).tolist() == [keys * 2 * 2 * 32 * 4 for keys in (60, 40, 60)]


# ---- where a sequence ends ----


def likely_to_end(model, prompts, length):
    """A token that some continuations have early, some late or not at all."""
    tokens, _ = sa.generate(model, prompts, length, temperature=0)
    has = tokens[:, :, None] == np.arange(VOCAB)
    first = np.where(has.any(axis=1), has.argmax(axis=1), length)
    token = np.argmax([len(set(column)) for column in first.T])
    assert len(set(first[:, token])) > 2
    return tokens, token, np.minimum(first[:, token] + 1, length)


@pytest.mark.parametrize("pad_token", [None, 0, -1, VOCAB])
@pytest.mark.parametrize("attention", ["fixed", "local,strided"])
def test_a_sequence_ends_at_its_eos_token(attention, pad_token):
    model, prompts = model_of(attention), prompts_of(LENGTHS)
    whole, eos, lengths = likely_to_end(model, prompts, 30)
    steps = []
    tokens, statistics = sa.generate(
        *(model, prompts, 30, 0),
        on_token=steps.append,
        eos_token=eos,
        pad_token=pad_token,
    )
    np.testing.assert_array_equal(statistics.lengths, lengths)
    assert tokens.dtype == statistics.lengths.dtype == np.int32
    pad_token = eos if pad_token is None else pad_token
    is_own = np.arange(30) < lengths[:, None]
    np.testing.assert_array_equal(tokens, np.where(is_own, whole, pad_token))
    np.testing.assert_array_equal(np.stack(steps, 1), tokens[:, : len(steps)])


def test_a_call_ends_with_its_last_sequence():
    model, prompts, steps = model_of(), 2 * prompts_of([9]), []
    whole, _ = sa.generate(model, prompts, 30, temperature=0)
    eos = whole[0, 3]
    first = whole[0].tolist().index(eos) + 1
    tokens, statistics = sa.generate(
        model, prompts, 30, 0, on_token=steps.append, eos_token=eos
    )
    assert statistics.lengths.tolist() == [first] * 2 == [len(steps)] * 2
    assert tokens.shape == (2, 30) and (tokens[:, first - 1 :] == eos).all()


def test_what_is_drawn_does_not_depend_on_where_others_end():
    model, prompts = model_of(), prompts_of([9, 5, 20])
    options = {"temperature": 3.0, "seed": 4}
    whole, _ = sa.generate(model, prompts, 20, **options)
    eos = whole[0, 2]
    tokens, statistics = sa.generate(model, prompts, 20, eos_token=eos, **options)
    assert statistics.lengths[0] == 3 < statistics.lengths.max()
    for own, want, length in zip(tokens, whole, statistics.lengths):
        np.testing.assert_array_equal(own[:length], want[:length])


def test_a_sequence_that_has_ended_may_turn_to_nan():
    model, prompts = model_of.__wrapped__(), prompts_of([12, 2])
    whole, _ = sa.generate(model, prompts, 5, temperature=0)
    eos = whole[0, 0]
    assert eos not in whole[1]
    embedding = model.position_embedding.get_weights()[0]
    embedding[12] = np.nan  # the position of its end token
    model.position_embedding.set_weights([embedding])
    tokens, statistics = sa.generate(model, prompts, 5, 0, eos_token=eos)
    assert statistics.lengths.tolist() == [1, 5]
    np.testing.assert_array_equal(tokens[1], whole[1])


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


def test_a_decoder_serves_many_calls(monkeypatch):
    model = model_of.__wrapped__()  # one of its own
    decoder = sa.Decoder(model, 2)
    caches = decoder._caches
    monkeypatch.setattr(tf, "Variable", None)  # which nothing may make
    monkeypatch.setattr(generation._Network, "__init__", None)
    for lengths in [3, 3], [40, 7], [1, 12]:
        prompts = prompts_of(lengths)
        tokens, _ = sa.generate(decoder, prompts, 20, temperature=0)
        assert_are_of_the_whole_model(model, prompts, tokens)
        model.set_weights([1.25 * w for w in model.get_weights()])  # is seen
    assert decoder._caches is caches
    assert traces(model, 2) == 1


def test_a_decoder_outlives_the_traces_that_a_model_keeps():
    model = model_of.__wrapped__()
    decoder = sa.Decoder(model, 1)
    network = decoder._network
    for batch in range(2, generation.KEPT_NETWORKS + 2):
        sa.Decoder(model, batch)
    sa.generate(decoder, [[1, 2]], 3)
    assert decoder._network is network


def test_a_decoder_follows_a_model_whose_plans_change():
    model, prompts = model_of.__wrapped__("all"), prompts_of([5, 11])
    decoder = sa.Decoder(model, 2)
    before, _ = sa.generate(decoder, prompts, 30, temperature=0)
    plan = model_of("local").blocks[0].attention.block_mask
    for block in model.blocks:
        block.attention.block_mask = plan
    tokens, _ = sa.generate(decoder, prompts, 30, temperature=0)
    assert (tokens != before).any()
    assert_are_of_the_whole_model(model, prompts, tokens)


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
    kept = vars(model)["_decoding_networks"]
    assert [network.batch for network in kept] == [3, 4, 5, 6]
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


# ln of (0.4, 0.25, 0.2, 0.1, 0.05), in another order
P = np.array([0.1, 0.4, 0.05, 0.25, 0.2])


@pytest.mark.parametrize(
    "temperature, top_k, top_p, want",
    [
        (1.0, None, None, P),
        (0.5, None, None, P**2),
        (2.0, 3, None, [0, 0.4**0.5, 0, 0.5, 0.2**0.5]),
        (1.0, None, 1.0, P),
        (1.0, None, 1e-9, [0, 1, 0, 0, 0]),
        (1.0, None, 0.39, [0, 1, 0, 0, 0]),
        (1.0, None, 0.4, [0, 1, 0, 0, 0]),  # exactly as much as is asked for
        (1.0, None, 0.41, [0, 0.4, 0, 0.25, 0]),
        (1.0, None, 0.65, [0, 0.4, 0, 0.25, 0]),
        (1.0, None, 0.85, [0, 0.4, 0, 0.25, 0.2]),
        (1.0, None, 0.9, [0.1, 0.4, 0, 0.25, 0.2]),
        (1.0, None, 0.951, P),
        # Of the likeliest three, the first has 0.4 / 0.85 = 0.47.
        (1.0, 3, 0.47, [0, 1, 0, 0, 0]),
        (1.0, 3, 0.48, [0, 0.4, 0, 0.25, 0]),
        (1.0, 3, 0.99, [0, 0.4, 0, 0.25, 0.2]),
        (1.0, 2, 0.99, [0, 0.4, 0, 0.25, 0]),
        # By temperature the first has 0.16 / 0.275 = 0.58, or 0.298.
        (0.5, None, 0.58, [0, 1, 0, 0, 0]),
        (0.5, None, 0.59, [0, 0.4**2, 0, 0.25**2, 0]),
        (2.0, None, 0.29, [0, 1, 0, 0, 0]),
        (2.0, None, 0.4, [0, 0.4**0.5, 0, 0.5, 0]),
        (2.0, 2, 0.55, [0, 1, 0, 0, 0]),  # 0.56 of the two
        (2.0, 2, 0.57, [0, 0.4**0.5, 0, 0.5, 0]),
    ],
)
def test_tokens_are_drawn_from_the_distribution(temperature, top_k, top_p, want):
    want = np.array(want) / np.sum(want)
    # Any constant may be added to logits.
    logits = (np.log(P) + 7).astype(np.float32)[None]
    got = np.exp(generation._likely(logits, temperature, top_k, top_p))[0]
    got /= got.sum()
    np.testing.assert_array_equal(got > 0, want > 0)
    assert np.abs(got - want).max() < 1e-6
    draws, random = 40000, np.random.RandomState(0)
    tokens = generation._sample(
        np.tile(logits, [draws, 1]), temperature, top_k, top_p, random
    )
    got = np.bincount(tokens, minlength=len(want)) / draws
    assert (np.abs(got - want) <= 4 * np.sqrt(want * (1 - want) / draws)).all()


def test_each_sequence_has_its_own_likely_tokens():
    logits = np.log([[0.5, 0.5, 1e-9], [0.2, 0.2, 0.6], [1 / 3] * 3])
    got = generation._likely(logits.astype(np.float32), 1.0, None, 0.5) > -np.inf
    # Of equally likely ones the first.
    assert got.tolist() == [
        [True, False, False],
        [False, False, True],
        [True, True, False],
    ]


def test_top_p_of_generate_leaves_out_what_is_unlikely():
    model, prompt = model_of(), tokens_of(PROMPT)
    greedy, _ = sa.generate(model, prompt, 10, temperature=0)
    options = {"temperature": 1.0, "seed": 0}
    tokens, _ = sa.generate(model, prompt, 10, top_p=1e-6, **options)
    np.testing.assert_array_equal(tokens, greedy)
    some, _ = sa.generate(model, prompt, 10, top_p=0.9, **options)
    every, _ = sa.generate(model, prompt, 10, **options)
    assert (some != greedy).any() and (some != every).any()


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
        ({"prompt": np.zeros([1, 0], int)}, r"prompt must be .* row of shape \(0,\)"),
        ({"prompt": np.zeros([5], int)}, r"prompt must be .* row of shape \(\)"),
        ({"prompt": [[1, 2], []]}, r"prompt must be .* row of shape \(0,\)"),
        ({"prompt": [[[1]], [[2]]]}, r"prompt must be .* row of shape \(1, 1\)"),
        ({"prompt": []}, "prompt must be .* got no row"),
        ({"prompt": 5}, r"prompt must be .* row of shape \(\)"),
        (
            {"prompt": [[0, VOCAB]]},
            r"prompt must be in \[0, vocab_size=40\), got 0 to 40",
        ),
        ({"prompt": [[-1, 0]]}, "prompt must be in .*, got -1 to 0"),
        ({"length": 0}, "length must be a positive integer, got 0"),
        ({"length": TIME}, r"at most time \+ 1 = 73 together, got 2 \+ 72"),
        ({"temperature": -0.5}, "temperature must be finite and >= 0, got -0.5"),
        ({"temperature": np.nan}, "temperature must be finite and >= 0, got nan"),
        ({"temperature": "0"}, "temperature must be finite and >= 0, got '0'"),
        ({"top_k": 0}, "top_k must be a positive integer, got 0"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_p": np.nan}, "top_p must be above 0 and at most 1, got nan"),
        ({"top_p": True}, "top_p must be above 0 and at most 1, got True"),
        ({"top_p": "0.9"}, "top_p must be above 0 and at most 1, got '0.9'"),
        ({"eos_token": VOCAB}, r"eos_token must be in \[0, vocab_size=40\), got 40"),
        ({"eos_token": -1}, "eos_token must be in .*, got -1"),
        ({"eos_token": 1.0}, "eos_token must be an integer, got 1.0"),
        ({"pad_token": 0.5}, "pad_token must be an integer, got 0.5"),
        ({"pad_token": 2**31}, "pad_token must fit int32, got 2147483648"),
        (
            {"prompt_lengths": [1, 1]},
            r"prompt_lengths must be \[batch=1\], got shape \(2,\)",
        ),
        (
            {"segment_ids": [[1]]},
            r"segment_ids must have the lengths .*, \[2\], got \[1\]",
        ),
        ({"segment_ids": [1, 1]}, r"segment_ids must be .* row of shape \(\)"),
        (
            {"prompt_lengths": [0]},
            r"prompt_lengths must be from 1 to .*, \[2\], got \[0\]",
        ),
        (
            {"prompt": [[1, 2], [3]], "prompt_lengths": [2, 2]},
            r"prompt_lengths must be from 1 to .*, \[2, 1\], got \[2, 2\]",
        ),
    ],
)
def test_generate_names_what_does_not_fit(options, message):
    arguments = dict({"prompt": [[1, 2]], "length": 4}, **options)
    with pytest.raises(ValueError, match=message):
        sa.generate(model_of(), **arguments)


def test_generate_wants_integers():
    with pytest.raises(TypeError, match="prompt must hold integers, got float64"):
        sa.generate(model_of(), [[1.0]], 4)
    with pytest.raises(TypeError, match="prompt_lengths must hold integers, got fl"):
        sa.generate(model_of(), [[1]], 4, prompt_lengths=[1.0])
    with pytest.raises(TypeError, match="segment_ids must hold integers, got float64"):
        sa.generate(model_of(), [[1]], 4, segment_ids=[[1.0]])
    decoder = sa.Decoder(model_of(), 1)
    with pytest.raises(TypeError, match="segment_ids must be integers, got float64"):
        decoder.prefill([[1]], np.zeros([1, TIME]))


def test_a_decoder_names_what_does_not_fit():
    decoder = sa.Decoder(model_of(), 2)
    for tokens, position, message in [
        ([1], 0, r"tokens must be \[batch=2\], got shape \(1,\)"),
        ([[1, 2]], 0, r"tokens must be \[batch\], got shape \(1, 2\)"),
        ([1, 2], TIME, "position must be from 0 to time - 1 = 71, got 72"),
        ([1, 2], [3, -1], r"position must be from 0 to .*, got \[3, -1\]"),
        ([1, 2], [3], r"position must be .* int \[batch=2\], got \[3\]"),
        ([1, 2], 1.0, "position must be an integer .*, got 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoder.step(tokens, position)
    for shape in (3, 4), (2, TIME + 1), (2,):
        with pytest.raises(ValueError, match=r"tokens must be \[batch.* got shape"):
            decoder.prefill(np.zeros(shape, np.int32))
    with pytest.raises(ValueError, match=r"segment_ids must be .*, got shape \(2, 4\)"):
        decoder.prefill(np.zeros([2, 4], np.int32), np.zeros([2, 4], np.int32))
    with pytest.raises(ValueError, match="rows as the decoder, batch=2, got 1"):
        sa.generate(decoder, [[1, 2]], 3)


def test_a_layer_that_looks_ahead_is_not_decoded():
    model = model_of.__wrapped__()  # one of its own
    layout, mask = sa.window_layout(TIME, 8, 8, 8), sa.window_mask(2, 2)
    plan = sa.BlockMask(layout, mask, 8, TIME, TIME)
    model.blocks[1].attention.block_mask = plan
    with pytest.raises(ValueError, match="whose row 1 attends to row 3"):
        sa.generate(model, [[1, 2]], 3)


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
    arguments = "--prompt été --length 20 --top-k 200 --top-p 0.9 --seed 1".split()
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
    assert "at most time + 1 = 129 together, got 7 + 123" in example(
        trained, "--length", 123
    )
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
