"""blocksparse_attention_impl: the fused op and blocksparse's three ops tell the same."""

import sys
import types

import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    assert_close,
    plain_attention_bwd,
    plain_attention_fwd,
    random_inputs,
    to_dtype,
)
from tf_helpers import MODES, merged, run_with_gradients

import sparse_attention as sa
from sparse_attention.plan.reference import attention_bwd, attention_fwd

PATTERNS = {
    "all": {},
    "local": {"local_attn_ctx": 48},
    "strided": {"local_attn_ctx": 8},
    "fixed": {"local_attn_ctx": 64, "num_verts": 2},
}


def attention(attn_mode, backend):
    def call(q, k, v):
        o = sa.blocksparse_attention_impl(
            q, k, v, 4, attn_mode, blocksize=16, backend=backend, **PATTERNS[attn_mode]
        )
        return [o]

    return call


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("attn_mode", PATTERNS)
def test_backends_match_oracle_within_their_dtype(attn_mode, dtype, mode):
    """The three ops store scores in bfloat16, so that is the dtype they are held to."""
    inputs = random_inputs(0, 2, 128, heads=4, head_dim=16, dtype=dtype)
    block_mask = sa.pattern_block_mask(attn_mode, 128, 4, 16, **PATTERNS[attn_mode])
    mask = block_mask.to_dense()
    qkv, do = inputs[:3], inputs.do
    oracle = [attention_fwd(*qkv, mask)[0], *attention_bwd(*qkv, mask, do)]
    for backend, plain_dtype in (("fused", dtype), ("blocksparse_ops", "bfloat16")):
        rounded = [to_dtype(x, plain_dtype) for x in inputs[:4]]
        plain = [plain_attention_fwd(*rounded[:3], mask)[0]]
        plain += plain_attention_bwd(*rounded[:3], mask, rounded[3])
        o, grads = run_with_gradients(
            attention(attn_mode, backend),
            [merged(x) for x in qkv],
            [merged(do)],
            mode,
        )
        for i, got in enumerate([*o, *grads]):
            got = to_dtype(got, plain_dtype).reshape(oracle[i].shape)
            assert_close(got, oracle[i], plain[i], 2 if i == 0 else 3)


def test_unknown_backend_is_refused():
    x = np.zeros([1, 32, 32], np.float32)
    with pytest.raises(ValueError, match="backend must be 'fused'.*got 'cuda'"):
        sa.blocksparse_attention_impl(x, x, x, 4, "all", backend="cuda")


def test_missing_real_package_is_told():
    x = np.zeros([1, 32, 32], np.float32)
    with pytest.raises(ImportError, match="needs the package blocksparse 1.13.1"):
        sa.blocksparse_attention_impl(x, x, x, 4, "all", backend="blocksparse")


@pytest.mark.parametrize("attn_mode", PATTERNS)
def test_real_backend_gets_our_layouts_and_masks(attn_mode, monkeypatch):
    """A stand-in for the real class, with our tables: it is what ours builds."""
    built = []

    class Real(sa.BlocksparseTransformer):
        def __init__(self, *args):
            built.append(self)
            super().__init__(*args)

    module = types.ModuleType("blocksparse.transformer")
    module.BlocksparseTransformer = Real
    monkeypatch.setitem(sys.modules, "blocksparse", types.ModuleType("blocksparse"))
    monkeypatch.setitem(sys.modules, "blocksparse.transformer", module)
    x = tf.zeros([1, 128, 32])
    for backend in ("blocksparse", "blocksparse_ops"):
        sa.blocksparse_attention_impl(
            x, x, x, 4, attn_mode, blocksize=16, backend=backend, **PATTERNS[attn_mode]
        )
    (real,) = built
    ours = sa.get_blocksparse_obj(128, 4, attn_mode, 16, **PATTERNS[attn_mode])
    for name in ("nt_lut", "nn_lut", "tn_lut", "softmax_mask"):
        np.testing.assert_array_equal(getattr(real, name), getattr(ours, name))
