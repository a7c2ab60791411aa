"""Against the real blocksparse: its tables, masks, NumPy results, and its class on our
ops."""

import os
import subprocess
import sys
import types

import blocks_oracle as oracle
import blocksparse_original
import numpy as np
import pytest
from blocks_runner import evaluate
from helpers import assert_close, to_dtype
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention.compat.ops import load_blocksparse_ops
from sparse_attention.compat.transformer import BlocksparseTransformer
from sparse_attention.native import loader

ORIGINAL = blocksparse_original.load().BlocksparseTransformer
LAYOUT_DTYPES = [bool, np.uint8, np.int8, np.int32, np.int64, np.float32, np.float64]


class Callback:
    """A random mask; remembers what it was called with."""

    def __init__(self, seed, dtype):
        self.seed, self.dtype, self.calls = seed, dtype, []

    def __call__(self, *args):
        self.calls.append(args)
        blk_shape, head_idx, query_blk_idx, key_blk_idx, blk_idx = args
        seed = hash((self.seed, head_idx, int(query_blk_idx), int(key_blk_idx)))
        random = np.random.RandomState(seed % 2**32)
        mask = random.random_sample(blk_shape) < random.choice([0.02, 0.5, 1.0])
        return mask.astype(self.dtype)


@st.composite
def constructor_arguments(draw, has_empty_rows):
    """What the original accepts: heads with equal numbers of blocks, at least one."""
    lut_heads, q_blocks, kv_blocks = (draw(st.integers(1, n)) for n in (3, 6, 6))
    random = np.random.RandomState(draw(st.integers(0, 2**31)))
    one = np.arange(q_blocks * kv_blocks) < draw(st.integers(1, q_blocks * kv_blocks))
    one = random.permutation(one).reshape(q_blocks, kv_blocks)
    if not has_empty_rows:
        one[:, 0] = True
    layout = np.stack([one[:, random.permutation(kv_blocks)] for _ in range(lut_heads)])
    layout = layout.astype(draw(st.sampled_from(LAYOUT_DTYPES)))
    heads = draw(st.sampled_from([None, 4])) if lut_heads == 1 else None
    if heads and draw(st.booleans()):
        layout = layout[0]
    return layout, draw(st.sampled_from([8, 16, 32, 64])), heads


@settings(max_examples=200)
@given(
    constructor_arguments(has_empty_rows=True),
    st.booleans(),
    st.sampled_from([bool, np.uint8, int]),
)
def test_tables_and_masks_equal_the_originals(arguments, has_mask, mask_dtype):
    callbacks = [Callback(1, mask_dtype) if has_mask else None for _ in range(2)]
    ours, theirs = (
        create(*arguments, mask_callback=callback, name="a name")
        for create, callback in zip((BlocksparseTransformer, ORIGINAL), callbacks)
    )
    for name in (
        "name heads lut_heads blocks blk_size blk_shape ctx_blks_q ctx_blks_k nn_max "
        "tn_max softmax_dtype nt_list nn_list tn_list"
    ).split():
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in "nt_lut nn_lut tn_lut softmax_mask softmax_mask_np".split():
        got, expected = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_array_equal(got, expected)
        assert getattr(got, "dtype", None) == getattr(expected, "dtype", None)
    for head, blocks in enumerate(theirs.nt_list):
        for block in range(len(blocks)):
            assert ours.block_coord(block, head) == theirs.block_coord(block, head)
    if has_mask:
        assert callbacks[0].calls == callbacks[1].calls


def assert_equal_bits(got, expected):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()


@settings(max_examples=100)
@given(
    constructor_arguments(has_empty_rows=False),  # its softmax fails on an empty row
    st.booleans(),
    st.integers(0, 2**31),
)
def test_numpy_results_equal_the_originals(arguments, has_mask, seed):
    callback = Callback(seed, bool) if has_mask else None
    ours, theirs = (
        create(*arguments, mask_callback=callback)
        for create in (BlocksparseTransformer, ORIGINAL)
    )
    block_size = ours.blk_size
    random = np.random.RandomState(seed)
    q, k = (
        random.standard_normal((2, n * block_size, ours.heads * 8)).astype("f")
        for n in (ours.ctx_blks_q, ours.ctx_blks_k)
    )
    w = random.standard_normal((2, ours.heads, ours.blocks) + ours.blk_shape).astype(
        "f"
    )
    dy = random.standard_normal(w.shape).astype("f")
    assert_equal_bits(ours.nt_test(q, k), theirs.nt_test(q, k))
    assert_equal_bits(ours.nn_test(w, k), theirs.nn_test(w, k))
    assert_equal_bits(ours.tn_test(w, q), theirs.tn_test(w, q))
    keys = (None, 0, 5, block_size + 1) if has_mask else (None,)
    for key in keys:
        y = theirs.masked_softmax_test(w, 0.7, key)
        assert_equal_bits(ours.masked_softmax_test(w, 0.7, key), y)
        dx = theirs.masked_softmax_grad_test(dy, y, 0.7)
        assert_equal_bits(ours.masked_softmax_grad_test(dy, y, 0.7), dx)


# ---- the original's class and gradients on our ops ----


def pipeline(bst, q, k, v, key):
    w = bst.query_key_op(q, k)
    a = bst.masked_softmax(w, scale=0.25, autoregress_at_key=key)
    return [w, a, bst.weight_value_op(a, v)]


def example(create, block_size):
    layout = np.tril(np.ones((2, 3, 4), int), 1)
    return create(layout, block_size, mask_callback=Callback(3, bool))


def example_inputs(bst, dtype):
    random = np.random.RandomState(7)
    lengths = (bst.ctx_blks_q, bst.ctx_blks_k, bst.ctx_blks_k, bst.ctx_blks_q)
    return [
        to_dtype(random.standard_normal((2, n * bst.blk_size, 2 * 16)), dtype)
        for n in lengths
    ]


def run_original(path):
    """In a process of its own: the original's class and gradients on our ops."""
    module = blocksparse_original.load(
        loader.blocksparse_ops(), registers_gradients=True
    )
    load_blocksparse_ops()  # finds the gradients taken
    registry = sys.modules["tensorflow.python.framework.ops"]._gradient_registry
    gradient = registry.lookup("BlocksparseMaskedSoftmax")
    results = {"gradients": gradient.__module__}
    for case in CASES:
        block_size, dtype, key = case
        bst = example(module.BlocksparseTransformer, block_size)
        *inputs, dy = example_inputs(bst, dtype)
        fetched = evaluate(
            "graph",
            lambda q, k, v, b=bst, key=key: pipeline(b, q, k, v, key),
            inputs,
            dy,
        )
        for name, array in zip(NAMES, fetched):
            results["%s %s %s %s" % (case + (name,))] = np.asarray(array, np.float32)
    np.savez(path, **results)


NAMES = "w a y dq dk dv".split()
CASES = [
    (block_size, dtype, key)
    for block_size in (8, 16, 32, 64)
    for dtype in ("float32", "float16")
    for key in (None, 11)
]


@pytest.fixture(scope="module")
def original_on_our_ops(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("original") / "results.npz")
    code = "import sys, test_blocksparse_differential as t; t.run_original(sys.argv[1])"
    here = os.path.dirname(os.path.abspath(__file__))
    folders = [here, os.path.dirname(here)]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(folders))
    subprocess.run([sys.executable, "-c", code, path], check=True, env=env)
    with np.load(path) as results:
        return dict(results)


@pytest.mark.parametrize("block_size, dtype, key", CASES)
def test_original_class_on_our_ops_matches_its_numpy(
    original_on_our_ops, block_size, dtype, key
):
    bst = example(ORIGINAL, block_size)
    q, k, v, dy = (x.astype("f") for x in example_inputs(bst, dtype))
    a_dtype = {"float32": "bfloat16", "float16": "float16"}[dtype]
    got = {
        name: original_on_our_ops["%s %s %s %s" % (block_size, dtype, key, name)]
        for name in NAMES
    }

    def check(name, result_dtype, exact, plain, factor):
        as_computed = to_dtype(got[name], result_dtype)
        np.testing.assert_array_equal(as_computed.astype("f"), got[name])
        assert_close(as_computed, exact, to_dtype(plain, result_dtype), factor)

    # Step by step, each from the results of the one before, as the ops themselves did.
    w, a = got["w"], got["a"]
    check("w", "bfloat16", oracle.nt(bst, q, k), bst.nt_test(q, k), 2)
    exact = oracle.softmax(bst, w, 0.25, key)
    check("a", a_dtype, exact, bst.masked_softmax_test(w, 0.25, key), 2)
    check("y", dtype, oracle.nn(bst, a, v), bst.nn_test(a, v), 2)
    check("dv", dtype, oracle.tn(bst, a, dy), bst.tn_test(a, dy), 3)
    da = to_dtype(bst.nt_test(dy, v), a_dtype).astype("f")
    dw = to_dtype(bst.masked_softmax_grad_test(da, a, 0.25), a_dtype).astype("f")
    dw_exact = oracle.softmax_grad(bst, oracle.nt(bst, dy, v), a, 0.25)
    check("dq", dtype, oracle.nn(bst, dw_exact, k), bst.nn_test(dw, k), 3)
    check("dk", dtype, oracle.tn(bst, dw_exact, q), bst.tn_test(dw, q), 3)


def test_our_gradients_stay_out_where_the_originals_are(original_on_our_ops):
    assert original_on_our_ops["gradients"] == "blocksparse.transformer"


def test_our_ops_stay_out_where_the_original_is_loaded(monkeypatch):
    utils = types.ModuleType("blocksparse.utils")
    utils._op_module = object()
    monkeypatch.setitem(sys.modules, "blocksparse.utils", utils)
    assert load_blocksparse_ops() is utils._op_module
