"""BlocksparseTransformer and get_blocksparse_obj: tables, masks, attention, graphs."""

import json
import os
import subprocess
import sys

import blocks_oracle as oracle
import numpy as np
import pytest
import tensorflow as tf
from blocks_runner import (
    MODES,
    attend,
    check_attention,
    evaluate,
    plain_attention,
)
from helpers import assert_close, to_dtype

from sparse_attention.compat.transformer import (
    BlocksparseTransformer,
    get_blocksparse_obj,
)
from sparse_attention.plan.masks import Mask, causal_mask, local_mask

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- tables ----


def test_heads_with_different_block_counts_match_drawing():
    layout = [[[1, 0], [1, 1]], [[0, 0], [0, 1]]]
    bst = BlocksparseTransformer(
        layout, 8, mask_callback=lambda *_: np.ones((8, 8), int)
    )
    assert (bst.heads, bst.lut_heads, bst.blocks) == (2, 2, 3)
    assert bst.nt_list == [[(0, 0), (1, 0), (1, 1)], [(1, 1)]]
    assert bst.nt_lut[1].tolist() == [[1, 1], [-1, -1], [-1, -1]]
    assert bst.nn_list == [[[(0, 0)], [(1, 0), (2, 1)]], [[], [(0, 1)]]]
    assert bst.nn_lut[1].tolist() == [[2, 0], [2, 1], [0, 1], [-1, -1], [-1, -1]]
    assert bst.tn_list == [[[(0, 0), (1, 1)], [(2, 1)]], [[], [(0, 1)]]]
    assert bst.tn_lut[0].tolist() == [[2, 2], [4, 1], [0, 0], [1, 1], [2, 1]]
    assert (bst.nn_max, bst.tn_max) == (2, 2)
    assert bst.block_coord(2) == (1, 1)
    assert bst.block_coord(0, head=1) == (1, 1)
    assert (bst.softmax_mask_np[0] == 255).all() and (
        bst.softmax_mask_np[1, 0] == 255
    ).all()
    assert not bst.softmax_mask_np[1, 1:].any()
    with pytest.raises(IndexError):
        bst.block_coord(1, head=1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(layout=np.ones(3)), r"layout must be .* got shape \(3,\)"),
        (dict(layout=np.ones((1, 2, 3, 4))), r"got shape \(1, 2, 3, 4\)"),
        (dict(layout=np.ones((2, 0))), r"and not empty, got shape \(2, 0\)"),
        (dict(block_size=128), "block_size must be 8, 16, 32 or 64, got 128"),
        (dict(block_size="x"), "block_size must be 8, 16, 32 or 64, got 'x'"),
        (dict(heads=None), "heads must be a positive integer .* got None"),
        (dict(heads=0), "heads must be a positive integer, got 0"),
        (
            dict(layout=np.ones((2, 3, 3)), heads=4),
            "must have 1 head or heads=4, got 2",
        ),
        (
            dict(mask_callback=lambda *_: np.ones((8, 7), bool)),
            r"must return bool \(8, 8\), got bool \(8, 7\) for head 0, q block 0, kv",
        ),
        (
            dict(
                mask_callback=lambda h, i, q, k, b: np.ones(
                    (8, 8), int if b < 2 else "f"
                )
            ),
            r"got float32 \(8, 8\) for head 0, q block 1, kv block 1",
        ),
        (dict(mask_callback=lambda *_: None), r"got object \(\) for head 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    valid = dict(layout=np.tril(np.ones((2, 2))), block_size=8, heads=2)
    BlocksparseTransformer(**valid)
    with pytest.raises(ValueError, match=message):
        BlocksparseTransformer(**dict(valid, **arguments))


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
def test_mask_equals_its_callback(block_size):
    hop = Mask(lambda head, q, k: (q + k * 3 + head) % 5 > 0)
    mask = (local_mask(3 * block_size - 5) | hop) & causal_mask()

    def callback(blk_shape, head_idx, query_blk_idx, key_blk_idx, blk_idx):
        q, k = np.indices(blk_shape)
        q, k = q + query_blk_idx * block_size, k + key_blk_idx * block_size
        return mask(head_idx, q, k)

    layout = np.ones((2, 6, 5), bool)
    layout[1, 2] = False
    got, expected = (
        BlocksparseTransformer(layout, block_size, mask_callback=rule).softmax_mask
        for rule in (mask, callback)
    )
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == expected.dtype


# ---- get_blocksparse_obj ----


def seed_layout(n_ctx, heads, mode, block, local=None, verts=4, size=1):
    """OpenAI's blocks, one at a time."""
    n = n_ctx // block
    layout = np.zeros((heads, n, n), bool)
    for h, q, k in np.ndindex(layout.shape):
        if mode == "all":
            layout[h, q, k] = k <= q
        elif mode == "local":
            layout[h, q, k] = k <= q <= k + local // block
        elif mode == "strided":
            chunk = n_ctx // local // block
            layout[h, q, k] = k <= q and q // chunk == k // chunk
        else:
            stride = local // block
            column = (stride - 1 - k % stride) // size
            layout[h, q, k] = k <= q and (
                k // stride == q // stride or column == h % verts
            )
    return layout


PATTERNS = [
    (96, 2, "all", 32),
    (128, 2, "local", 16, 32),
    (128, 3, "local", 8, 64),
    (256, 2, "strided", 16, 4),
    (256, 4, "fixed", 16, 64),
    (256, 4, "fixed", 8, 32, 2, 2),
    (256, 2, "fixed", 16, 64, 1, 2),
    (112, 2, "fixed", 8, 32, 2, 1),
]


@pytest.mark.parametrize("arguments", PATTERNS)
def test_pattern_has_the_seeds_blocks_and_exact_mask(arguments):
    n_ctx, heads, mode, block = arguments[:4]
    local = arguments[4] if len(arguments) > 4 else None
    bst = get_blocksparse_obj(*arguments)
    layout = seed_layout(*arguments)
    differs = (layout != layout[0]).any()
    assert bst.lut_heads == (heads if differs else 1)
    computed = np.zeros_like(layout)
    for head in range(heads):
        computed[head][tuple(np.transpose(bst.nt_list[head % bst.lut_heads]))] = True
    np.testing.assert_array_equal(computed, layout)

    q, k = np.ogrid[:n_ctx, :n_ctx]
    allowed = np.kron(layout, np.ones((block, block), bool)) & (k <= q)
    if mode == "local":
        allowed &= q - k < local
    np.testing.assert_array_equal(oracle.attends(bst), allowed)


def test_strided_chunks_need_not_be_a_multiple_of_the_block():
    bst = get_blocksparse_obj(96, 1, "strided", 16, 4)
    q, k = np.ogrid[:96, :96]
    expected = (k <= q) & (q // 24 == k // 24)
    np.testing.assert_array_equal(oracle.attends(bst)[0], expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((100, 2, "all", 32), "n_ctx must be a multiple of blocksize=32, got 100"),
        ((0, 2, "all"), "n_ctx must be a positive integer, got 0"),
        ((64, 0, "all"), "n_heads must be a positive integer, got 0"),
        ((64, 2, "each"), "attn_mode must be .* got 'each'"),
        ((64, 2, "local"), "local_attn_ctx must be a positive integer, got None"),
        ((64, 2, "strided", 32, 0), "local_attn_ctx must be a positive integer, got 0"),
        ((64, 2, "strided", 32, 24), "local_attn_ctx must divide n_ctx=64, got 24"),
        ((64, 4, "fixed", 8, 36), "must be a multiple of block_size=8, got 36"),
        ((64, 3, "fixed", 8, 32), "heads must be a multiple of num_verts=4, got 3"),
        ((64, 4, "fixed", 8, 32, 2, 3), "vertsize must divide .* got 3"),
        ((48, 2, "all", 24), "block_size must be 8, 16, 32 or 64, got 24"),
    ],
)
def test_bad_pattern_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_blocksparse_obj(*arguments)


# ---- attention ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "dtype, weights",
    [("float32", "bfloat16"), ("float16", "float16"), ("bfloat16", "bfloat16")],
)
def test_attention_matches_oracle_in_blocksparses_dtypes(mode, dtype, weights):
    for arguments in PATTERNS[2:5]:
        dtypes = check_attention(get_blocksparse_obj(*arguments), mode, dtype)
        assert dtypes == ("bfloat16", weights)


@pytest.mark.parametrize("arguments", PATTERNS)
def test_attention_in_float32_matches_oracle(arguments):
    bst = get_blocksparse_obj(*arguments)
    dtypes = check_attention(bst, "graph", "float32", tf.float32, tf.float32)
    assert dtypes == ("float32", "float32")


def test_scores_keep_their_gradient_in_their_dtype():
    bst = get_blocksparse_obj(64, 2, "all")
    q = to_dtype(np.random.RandomState(1).standard_normal((1, 64, 32)), "float16")

    def pipeline(q):
        w = bst.query_key_op(q, q)
        a = bst.masked_softmax(w * tf.constant(2.0, tf.bfloat16))
        return [bst.weight_value_op(a, q)]

    for mode in MODES:
        y, dq = evaluate(mode, pipeline, [q], q)
        assert dq.dtype == y.dtype == np.float16
        assert np.isfinite(dq.astype("f")).all() and dq.any()


def test_autoregress_at_key_needs_a_mask():
    bst = BlocksparseTransformer(np.ones((1, 1)), 8, 1)
    with pytest.raises(ValueError, match="autoregress_at_key needs a mask_callback"):
        bst.masked_softmax(np.zeros((1, 1, 1, 8, 8), "f"), autoregress_at_key=3)


# ---- graphs ----


def test_equal_tables_are_one_constant_of_a_graph():
    for _ in range(2):
        with tf.Graph().as_default() as graph:
            q = tf.zeros([1, 64, 32])
            for _ in range(3):
                y = attend(get_blocksparse_obj(64, 2, "all"))(q, q, q)[-1]
            tf.gradients(y, q)
            names = [
                op.name.split("_lut")[0]
                for op in graph.get_operations()
                if "_lut" in op.name
            ]
            assert sorted(names) == ["nn", "nt", "tn"]
            # A collection that is listed would be in the way of saving the graph.
            assert graph.get_all_collection_keys() == []


def test_batch_may_be_unknown():
    bst = get_blocksparse_obj(64, 2, "local", 16, 32)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        q = tf.compat.v1.placeholder(tf.float32, [None, 64, 32])
        y = attend(bst)(q, q, q)[-1]
        (dq,) = tf.gradients(y, q)
        x = np.random.RandomState(1).standard_normal((3, 64, 32)).astype("f")
        all_of_them = session.run([y, dq], {q: x})
        for i in range(3):
            one = session.run([y, dq], {q: x[i : i + 1]})
            for got, expected in zip(one, all_of_them):
                assert got.tobytes() == expected[i].tobytes()


RUN_GRAPH = """
import json, sys
import numpy as np, tensorflow as tf
from google.protobuf import text_format
import sparse_attention as sa

path, seed = sys.argv[1:]
graph_def = tf.compat.v1.GraphDef()
with open(path) as file:
    text_format.Merge(file.read(), graph_def)
try:
    tf.import_graph_def(graph_def)
except (ValueError, tf.errors.NotFoundError) as error:
    assert "Blocksparse" in str(error) or "Bst" in str(error), error
else:
    sys.exit("the ops are there before they are loaded")
sa.load_ops(blocksparse_ops=True)
random = np.random.RandomState(int(seed))
inputs = ("q:0", "k:0", "v:0", "dy:0")
feed = {name: random.standard_normal((2, 24, 16)) for name in inputs}
with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    tf.import_graph_def(graph_def, name="")
    fetched = session.run(["y:0", "dq:0", "dk:0", "dv:0"], feed)
print(json.dumps([array.tolist() for array in fetched]))
"""


def run_graph(path, seed):
    """[4, 2, 24, 16] from a new process that knows our package alone."""
    env = dict(os.environ, PYTHONPATH=REPOSITORY)
    command = [sys.executable, "-c", RUN_GRAPH, str(path), str(seed)]
    said = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE).stdout
    return np.array(json.loads(said.decode().splitlines()[-1])).astype("f")


def test_graphs_run_in_a_new_process(tmp_path):
    """One that blocksparse's class built on TF 1.15 (see blocksparse_original.py), and
    the same from our class."""
    layout = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1]])
    bst = BlocksparseTransformer(layout, 8, 2, causal_mask())
    with tf.Graph().as_default() as graph:
        q, k, v, dy = (
            tf.compat.v1.placeholder(tf.float32, [None, 24, 16], name)
            for name in ("q", "k", "v", "dy")
        )
        w = bst.query_key_op(q, k)
        a = bst.masked_softmax(w, 0.25, autoregress_at_key=5)
        y = bst.weight_value_op(a, v)
        for name, tensor in zip(
            ("y", "dq", "dk", "dv"), [y] + tf.gradients(y, [q, k, v], dy)
        ):
            tf.identity(tensor, name)
    ours = tmp_path / "graph.pbtxt"
    ours.write_text(str(graph.as_graph_def()))
    theirs = os.path.join(REPOSITORY, "tests", "data", "blocksparse_graph.pbtxt")
    got = run_graph(theirs, 3)
    np.testing.assert_array_equal(run_graph(ours, 3), got)

    random = np.random.RandomState(3)
    q, k, v, dy = (random.standard_normal((2, 24, 16)).astype("f") for _ in range(4))
    a = oracle.softmax(bst, oracle.nt(bst, q, k), 0.25, 5)
    dw = oracle.softmax_grad(bst, oracle.nt(bst, dy, v), a, 0.25)
    exact = (
        oracle.nn(bst, a, v),
        oracle.nn(bst, dw, k),
        oracle.tn(bst, dw, q),
        oracle.tn(bst, a, dy),
    )
    plain = plain_attention(bst, q, k, v, dy, "bfloat16", "bfloat16", key=5)
    for one, exact64, one_plain, factor in zip(got, exact, plain, (2, 3, 3, 3)):
        assert_close(one, exact64, one_plain, factor)


def test_a_layout_of_scores_is_refused():
    with pytest.raises(TypeError, match="layout must be True or False.*-inf"):
        BlocksparseTransformer(np.where(np.tri(4), 0.0, -np.inf), 8, heads=1)
