"""OpenAI's two attention functions, dense and in blocks."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import DTYPES, PATTERNS, assert_attention_close, random_inputs, to_dtype
from tf_helpers import assert_same_bits, merged, run, run_with_gradients

import sparse_attention as sa


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attn_mode", PATTERNS)
@pytest.mark.parametrize("name", ["attention_impl", "blocksparse_attention_impl"])
def test_impl_matches_oracle(name, attn_mode, dtype):
    heads, q_len = 4, 43
    options = {"local_attn_ctx": 32, "blocksize": 8}
    if attn_mode == "fixed":
        options.update(num_verts=2, vertsize=2)
    inputs = random_inputs(0, 1, q_len, heads=heads, head_dim=8, dtype=dtype)
    mask = element_rule(attn_mode, q_len, heads)
    for recompute in (False, True):
        (o,), grads = run_with_gradients(
            lambda q, k, v: [
                getattr(sa, name)(
                    q,
                    k,
                    v,
                    heads,
                    attn_mode,
                    recompute=recompute,
                    **options,
                )
            ],
            [merged(x) for x in inputs[:3]],
            [merged(inputs.do)],
        )
        results = (x.reshape(inputs.q.shape) for x in (o, *grads))
        results = dict(zip(("o", "dq", "dk", "dv"), results))
        assert_attention_close(results, inputs._replace(dlse=None), mask)


def element_rule(attn_mode, q_len, heads, ctx=32, block=8, num_verts=2, vertsize=2):
    """The table of patterns, one element at a time."""
    stride = ctx // block
    mask = np.zeros([heads, q_len, q_len], bool)
    for h, i, j in np.ndindex(heads, q_len, q_len):
        if j > i:
            continue
        first = stride - 1 - (h % num_verts) * vertsize
        summary = [first - n for n in range(vertsize)]
        mask[h, i, j] = {
            "all": True,
            "local": i - j < ctx,
            "strided": (i - j) % ctx == 0,
            "fixed": i // ctx == j // ctx or j // block % stride in summary,
        }[attn_mode]
    return mask


def test_fixed_has_the_defaults_4_and_1():
    x = random_inputs(0, 1, 64, heads=4, head_dim=8)
    x = [merged(a) for a in x[:3]]
    for name in ("attention_impl", "blocksparse_attention_impl"):
        impl = getattr(sa, name)
        options = {"local_attn_ctx": 32, "blocksize": 8}
        by_default = run(lambda *x: impl(*x, 4, "fixed", **options), *x)
        options.update(num_verts=4, vertsize=1)
        assert_same_bits(
            by_default, run(lambda *x: impl(*x, 4, "fixed", **options), *x)
        )


def test_dense_reference_has_a_float32_softmax():
    for dtype in (tf.float16, tf.bfloat16, tf.float32):
        with tf.Graph().as_default() as graph:
            x = tf.zeros([1, 8, 8], dtype)
            assert sa.attention_impl(x, x, x, 1, "all").dtype == dtype
            (softmax,) = (op for op in graph.get_operations() if op.type == "Softmax")
            assert softmax.outputs[0].dtype == tf.float32


@pytest.mark.parametrize(
    "dtype, size",
    [("float16", 34), ("bfloat16", 1e6), ("float32", 1e6), ("float32", 1e20)],
)
@pytest.mark.parametrize("attn_mode", PATTERNS)
def test_dense_reference_does_not_see_the_future(attn_mode, dtype, size):
    """Nor any other masked key, however low the scores of the allowed ones are."""
    q = np.full([1, 64, 4 * 64], size, np.float32)
    v = np.arange(64.0, dtype=np.float32)[None, :, None] + np.zeros([1, 64, 4 * 64])
    q, k, v = (to_dtype(x, dtype) for x in (q, -q, v))
    (o,) = run(
        lambda q, k, v: [sa.attention_impl(q, k, v, 4, attn_mode, 32, 8)], *(q, k, v)
    )
    mask = element_rule(attn_mode, 64, 4, num_verts=4, vertsize=1)
    last = np.where(mask, np.arange(64), -1).max(axis=2)  # a mean is not above it
    assert not (o.reshape(64, 4, 64) > last.T[:, :, None]).any()


def test_dense_reference_takes_an_unknown_time():
    arrays = [merged(x) for x in random_inputs(0, 1, 40, heads=4, head_dim=8)[:3]]
    for attn_mode in PATTERNS:

        def dense(q, k, v, shape=None):
            q, k, v = (
                tf.compat.v1.placeholder_with_default(x, shape or x.shape)
                for x in (q, k, v)
            )
            return sa.attention_impl(q, k, v, 4, attn_mode, 16, blocksize=4)

        want = run(dense, *arrays)
        assert_same_bits(
            run(lambda *x: dense(*x, shape=[None, None, 32]), *arrays), want
        )


# ---- errors ----


@pytest.mark.parametrize(
    "message, options",
    [
        ("local_attn_ctx must be a positive integer, got None", {"attn_mode": "local"}),
        ("local_attn_ctx must be a positive integer, got 0",
         {"attn_mode": "strided", "local_attn_ctx": 0}),
        ("local_attn_ctx must be a positive integer, got -8",
         {"attn_mode": "fixed", "local_attn_ctx": -8}),
        ("must be a multiple of block_size=8, got 20",
         {"attn_mode": "fixed", "local_attn_ctx": 20}),
        ("num_verts", {"attn_mode": "fixed", "local_attn_ctx": 32, "num_verts": 3}),
        ("vertsize",
         {"attn_mode": "fixed", "local_attn_ctx": 32, "num_verts": 1, "vertsize": 3}),
        ("num_verts",
         {"attn_mode": "fixed", "local_attn_ctx": 16, "num_verts": 4}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["attention_impl", "blocksparse_attention_impl"])
def test_bad_patterns_are_refused(name, message, options):
    x = np.zeros([2, 64, 32], np.float32)
    with pytest.raises(ValueError, match=message):
        run(lambda x: getattr(sa, name)(x, x, x, 4, blocksize=8, **options), x)


@pytest.mark.parametrize(
    "name, known",
    [
        ("attention_impl", "'all', 'local', 'strided' or 'fixed'"),
        (
            "blocksparse_attention_impl",
            "'all', 'local', 'strided', 'fixed' or 'merged'",
        ),
    ],
)
def test_unknown_patterns_are_refused(name, known):
    x = np.zeros([2, 64, 32], np.float32)
    with pytest.raises(ValueError, match=f"attn_mode must be {known}, got 'dense'"):
        run(lambda x: getattr(sa, name)(x, x, x, 4, "dense", blocksize=8), x)


@pytest.mark.parametrize("name", ["attention_impl", "blocksparse_attention_impl"])
def test_heads_that_openais_default_does_not_divide_are_told_the_remedy(name):
    x = np.zeros([2, 64, 24], np.float32)
    with pytest.raises(ValueError, match="must .*3.*num_verts=1 gives all of them"):
        run(lambda x: getattr(sa, name)(x, x, x, 3, "fixed", 32, 8), x)


def test_bad_block_size_is_refused():
    x = np.zeros([2, 64, 32], np.float32)
    with pytest.raises(ValueError, match="block_size must be one of .* got 24"):
        run(lambda x: sa.blocksparse_attention_impl(x, x, x, 4, "all", blocksize=24), x)
