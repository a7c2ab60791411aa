"""The pure-TensorFlow path, which is taken where nothing can be compiled."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf
from helpers import DTYPES, PATTERNS, cases, random_inputs
from hypothesis import given, settings
from tf_helpers import (
    MODES,
    assert_same_bits,
    attention_on,
    check_attention,
    merged,
    run,
    run_script,
    run_with_gradients,
    take_kernels_away,
)

import sparse_attention as sa
from sparse_attention.ops.plan_tensors import kept


@pytest.fixture(autouse=True)
def no_compiled_ops(monkeypatch):
    take_kernels_away(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attn_mode", PATTERNS)
def test_fallback_matches_oracle_in_every_pattern(attn_mode, dtype):
    block_mask = sa.pattern_block_mask(attn_mode, 75, 4, 8, local_attn_ctx=32)
    options = {"kv_heads": 2, "kv_lengths": [75, 31]}
    check_attention(
        attention_on(block_mask, 4, **options),
        block_mask,
        heads=4,
        head_dim_v=24,
        dtype=dtype,
        with_dlse=True,
        **options,
    )


@pytest.mark.parametrize("mode", MODES)
def test_fallback_matches_oracle_in_every_mode(mode):
    layout = np.array([[[1, 1, 1, 0], [0, 1, 1, 1]], [[0, 0, 0, 0], [1, 0, 0, 0]]])
    block_mask = sa.BlockMask(layout, sa.strided_mask(3), 16, q_len=23, kv_len=61)
    options = {"kv_lengths": [50, 0], "softmax_scale": 0.3}
    check_attention(
        attention_on(block_mask, 2, **options),
        block_mask,
        mode,
        with_dlse=True,
        **options,
    )


@settings(max_examples=12)
@given(case=cases())
def test_fallback_matches_oracle_on_drawn_plans(case):
    block_mask = sa.BlockMask(*case)
    attention = attention_on(block_mask, block_mask.heads)
    check_attention(attention, block_mask, "eager", heads=block_mask.heads, head_dim=8)


@pytest.mark.parametrize("mode", MODES)
def test_fallback_takes_an_unknown_or_empty_batch(mode):
    block_mask = sa.pattern_block_mask("local", 24, 2, 8, local_attn_ctx=8)
    inputs = random_inputs(0, 3, 24)

    def attention(q, k, v):
        if mode != "eager":
            q, k, v = (
                tf.compat.v1.placeholder_with_default(x, [None, 24, 32])
                for x in (q, k, v)
            )
        o, lse = attention_on(block_mask, 2)(q, k, v)
        assert mode == "eager" or o.shape.as_list() == [None, 24, 32]
        return o, lse

    arrays = [merged(x) for x in inputs[:4]] + [inputs.dlse]
    want = run_with_gradients(attention, arrays[:3], arrays[3:], mode)
    for batch in (0, 1):
        part = [x[:batch] for x in arrays]
        got = run_with_gradients(attention, part[:3], part[3:], mode)
        for g, w in zip(tf.nest.flatten(got), tf.nest.flatten(want)):
            assert g.shape == (batch,) + w.shape[1:]
            np.testing.assert_array_almost_equal_nulp(g, w[:batch], 64)


def test_fallback_does_not_leak_keys_that_nobody_attends_to():
    # Keys 9 to 15 lie in a computed block; from 20 on they lie past the lengths.
    mask = sa.Mask(
        lambda head, q_idx, kv_idx: (kv_idx < 9) | (kv_idx >= 16) | (q_idx < 0)
    )
    block_mask = sa.BlockMask(np.ones([1, 1, 2]), mask, 16)
    inputs = random_inputs(0, 1, 16, 32)
    q, k, v, do = (merged(x) for x in inputs[:4])
    bad_k, bad_v = k.copy(), v.copy()
    for x in (bad_k, bad_v):
        x[:, 9:16], x[:, 20:] = np.nan, np.inf
    attention = attention_on(block_mask, 2, kv_lengths=[20])
    clean, dirty = (
        run_with_gradients(attention, [q, *kv], [do, inputs.dlse])
        for kv in ([k, v], [bad_k, bad_v])
    )
    assert_same_bits(clean, dirty)


@pytest.mark.parametrize("kv_lengths", [[-1, 3], [3, 25]])
@pytest.mark.parametrize("mode", MODES)
def test_fallback_refuses_lengths_out_of_range(mode, kv_lengths):
    block_mask = sa.BlockMask(np.ones([1, 3, 3]), None, 8)
    x = np.ones([2, 24, 8], np.float32)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"must be in \[0, kv_len=24\]"
    ):
        run(
            lambda x, n: sa.block_sparse_attention(
                x, x, x, block_mask, 1, kv_lengths=n
            ),
            x,
            np.array(kv_lengths, np.int32),
            mode=mode,
        )


def test_fallback_keeps_what_it_reads_until_it_is_cleared():
    block_mask = sa.pattern_block_mask("local", 24, 2, 8, local_attn_ctx=8)
    x = np.ones([1, 24, 16], np.float32)
    want = run(attention_on(block_mask, 2), x, x, x)
    (pairs,) = kept(block_mask).values()
    run(attention_on(block_mask, 2), x, x, x)
    assert list(kept(block_mask).values()) == [pairs]
    masks = weakref.ref(pairs.masks)
    sa.clear_plans()
    del pairs
    gc.collect()
    assert masks() is None
    assert_same_bits(run(attention_on(block_mask, 2), x, x, x), want)


NO_COMPILER = """
import warnings
import numpy as np
import tensorflow as tf
import sparse_attention as sa

x = tf.constant(np.ones([1, 16, 8], np.float32))
block_mask = sa.BlockMask(np.ones([1, 2, 2]), sa.causal_mask(), 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        o = sa.block_sparse_attention(x, x, x, block_mask, heads=1)
print([str(w.message) for w in caught if w.category is RuntimeWarning])
try:
    sa.load_ops()
except RuntimeError as error:
    print(error)
"""


def test_without_a_compiler_one_warning_is_given(tmp_path):
    warned, refused = run_script(
        NO_COMPILER,
        SPARSE_ATTENTION_NO_JIT="1",
        SPARSE_ATTENTION_CACHE_DIR=str(tmp_path),
    ).splitlines()
    assert warned.count("cannot be compiled here") == 1 and "doctor" in warned
    assert "the attention ops must be compiled to load a graph" in refused
