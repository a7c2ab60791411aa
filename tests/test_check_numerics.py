"""tf.debugging.enable_check_numerics stops at no infinity that nobody asked for."""

import warnings

import numpy as np
import pytest
import tensorflow as tf
from helpers import PATTERNS

import sparse_attention as sa
from sparse_attention.native import loader


@pytest.fixture(autouse=True)
def checked():
    tf.debugging.enable_check_numerics()
    yield
    tf.debugging.disable_check_numerics()


def x():
    print("seed 0")
    return tf.constant(np.random.RandomState(0).normal(size=[1, 40, 32]), tf.float32)


def results(function, mode):
    """What `function(x)` gives, and its gradient."""

    def both(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return y, tape.gradient(y, x)

    return (both if mode == "eager" else tf.function(both))(x())


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("path", ["kernels", "fallback"])
def test_a_query_without_keys_is_no_fault(path, mode, monkeypatch):
    if path == "fallback":
        loaded = {"attention_ops": loader.Loaded(None, "a test")}
        monkeypatch.setattr(loader, "_loaded", loaded)
    layout = np.tri(5, k=-1)  # the first queries read nothing
    plan = sa.BlockMask(layout, sa.local_mask(13), block_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        o, dx = results(lambda x: sa.block_sparse_attention(x, x, x, plan, 4), mode)
    assert not o[0, :8].numpy().any() and o[0, 8:].numpy().all()
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("attn_mode", PATTERNS)
@pytest.mark.parametrize("name", ["attention_impl", "blocksparse_attention_impl"])
def test_openais_functions_are_no_fault(name, attn_mode, mode):
    for options in {}, {"recompute": True}:
        y, dx = results(
            lambda x: getattr(sa, name)(x, x, x, 4, attn_mode, 32, 8, **options), mode
        )
        assert np.isfinite(y).all() and np.isfinite(dx).all()


def test_generation_is_no_fault():
    model = sa.SparseTransformer(
        50, time=64, layers=2, width=32, heads=4, local_attn_ctx=32, block_size=8
    )
    tokens = sa.generate(model, np.zeros([2, 3], np.int32), 9, temperature=0)
    assert len(tokens) == 2


def test_other_infinities_are_still_found():
    q = tf.fill([1, 40, 32], np.float32(1e38))
    plan = sa.pattern_block_mask("all", 40, 4, 8)
    with pytest.raises(tf.errors.InvalidArgumentError, match="NaN|Inf"):
        sa.block_sparse_attention(q, q, q * 0 + 1, plan, 4)
