"""blocksparse's TensorFlow ops, one at a time: numbers, gradients, bad input."""

import hashlib
import os
import subprocess
import sys

import blocks_oracle as oracle
import numpy as np
import pytest
import tensorflow as tf
from blocks_oracle import blocks_of, f32, random_layout, random_mask, rows
from blocks_runner import MODES, evaluate
from helpers import DTYPES, assert_close, to_dtype

from sparse_attention.compat.ops import load_blocksparse_ops
from sparse_attention.compat.transformer import BlocksparseTransformer


def transformer(
    block_size=16, heads=3, shared=False, mask_callback=random_mask, seed=0
):
    layout = random_layout(1 if shared else heads, seed)
    return BlocksparseTransformer(layout, block_size, heads, mask_callback)


# ---- products ----


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
@pytest.mark.parametrize("head_dim", [8, 40, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_match_oracle(block_size, head_dim, dtype):
    bst = transformer(block_size, shared=head_dim == 40)
    q, k = (rows(bst, side, head_dim, dtype, 1) for side in ("q", "kv"))
    for blocks_dtype in DTYPES:
        w = blocks_of(bst, blocks_dtype, 2)
        nt, nn, tn = evaluate(
            "graph",
            lambda q, k, w, dtype=blocks_dtype: [
                bst.nt_op(q, k, dtype=tf.as_dtype(dtype)),
                bst.nn_op(w, k),
                bst.tn_op(w, q),
            ],
            [q, k, w],
        )
        plain = bst.nt_test(f32(q), f32(k))
        assert_close(nt, oracle.nt(bst, q, k), to_dtype(plain, blocks_dtype), 2)
        plain = to_dtype(bst.nn_test(f32(w), f32(k)), dtype)
        assert_close(nn, oracle.nn(bst, w, k), plain, 2)
        plain = to_dtype(bst.tn_test(f32(w), f32(q)), dtype)
        assert_close(tn, oracle.tn(bst, w, q), plain, 2)


def test_unused_blocks_and_rows_without_blocks_are_zero():
    bst = transformer()
    counts = [len(blocks) for blocks in bst.nt_list]
    assert min(counts) < bst.blocks == max(counts)
    q, k = (rows(bst, side, 16, "float32", 1) for side in ("q", "kv"))
    x = blocks_of(bst, "bfloat16", 2)
    nt, y, dx, nn, tn = evaluate(
        "graph",
        lambda q, k, x: [
            bst.nt_op(q, k),
            bst.masked_softmax(x),
            tf.gradients(bst.masked_softmax(x), x)[0],
            bst.nn_op(x, k),
            bst.tn_op(x, q),
        ],
        [q, k, x],
    )
    for head, count in enumerate(counts):
        for blocks in (nt, y, dx):
            assert not f32(blocks[:, head, count:]).any()
    assert not nn[:, 16:32].any() and nn[:, :16].all()
    assert not tn[:, 32:48].any() and tn[:, :16].all()


# ---- softmax ----


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_matches_oracle(block_size, x_dtype, dtype):
    for mask in (random_mask, None):
        bst = transformer(block_size, shared=block_size == 16, mask_callback=mask)
        x = blocks_of(bst, x_dtype, 1)
        dy = blocks_of(bst, dtype, 2)
        y, dx = evaluate(
            "graph",
            lambda x, bst=bst: [bst.masked_softmax(x, 0.3, dtype=tf.as_dtype(dtype))],
            [x],
            dy,
        )
        plain = to_dtype(bst.masked_softmax_test(f32(x), 0.3), dtype)
        assert_close(y, oracle.softmax(bst, x, 0.3), plain, 2)
        plain = bst.masked_softmax_grad_test(f32(dy), f32(y), 0.3)
        plain = to_dtype(to_dtype(plain, dtype), x_dtype)
        assert dx.dtype == x.dtype
        assert_close(dx, oracle.softmax_grad(bst, dy, y, 0.3), plain, 3)


def test_masked_softmax_ignores_masked_scores():
    bst = transformer()
    x = blocks_of(bst, "float32", 1)
    poisoned = x.copy()
    hidden = ~oracle.from_dense(bst, oracle.attends(bst)[None])[0]
    poisoned[:, hidden] = np.resize([np.nan, np.inf, 1e30], poisoned[:, hidden].shape)
    clean, got = evaluate(
        "graph", lambda *xs: [bst.masked_softmax(x, 0.5) for x in xs], [x, poisoned]
    )
    assert clean.tobytes() == got.tobytes()


def test_masked_softmax_of_query_without_allowed_keys_is_even():
    layout = np.array([[1, 1, 1]])
    bst = BlocksparseTransformer(layout, 8, 1, lambda *_: np.eye(8) > 1)
    x = blocks_of(bst, "bfloat16", 1)
    (y,) = evaluate("graph", lambda x: [bst.masked_softmax(x)], [x])
    np.testing.assert_array_equal(
        f32(y), f32(to_dtype(np.full(x.shape, 1 / 24), "bfloat16"))
    )


def test_softmax_takes_negative_and_huge_scores():
    bst = transformer(mask_callback=None)
    x = f32(blocks_of(bst, "bfloat16", 1)) * 1e30
    for scale in (-1.0, 0.0, 1e7):
        (y,) = evaluate(
            "graph", lambda x, scale=scale: [bst.softmax(x, scale, tf.float32)], [x]
        )
        plain = bst.masked_softmax_test(x, scale)
        assert_close(y, oracle.softmax(bst, x, scale), plain, 2)


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
@pytest.mark.parametrize("key_dtype", [np.int32, np.int64])
def test_autoregressive_mask_matches_oracle(block_size, key_dtype):
    bst = transformer(block_size)
    x = blocks_of(bst, "float32", 1)
    for key in (
        0,
        1,
        block_size - 1,
        block_size,
        2 * block_size + 3,
        4 * block_size - 1,
    ):
        (y,) = evaluate(
            "graph",
            lambda x, key=key: [
                bst.masked_softmax(x, 0.5, key_dtype(key), dtype=tf.float32)
            ],
            [x],
        )
        plain = bst.masked_softmax_test(x, 0.5, key)
        assert_close(y, oracle.softmax(bst, x, 0.5, key), plain, 2)


# ---- gradients ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_products_match_oracle(mode, dtype):
    bst = transformer()
    q, k = (rows(bst, side, 24, dtype, 1) for side in ("q", "kv"))
    w = blocks_of(bst, "bfloat16", 2)

    def check(product, inputs, d_output, *expected):
        grads = evaluate(mode, lambda a, b: [product(a, b)], inputs, d_output)[1:]
        for got, x, (name, *operands) in zip(grads, inputs, expected):
            assert got.dtype == x.dtype
            plain = getattr(bst, name + "_test")(*map(f32, operands))
            exact = getattr(oracle, name)(bst, *operands)
            assert_close(got, exact, to_dtype(plain, x.dtype.name), 3)

    dw, dy = blocks_of(bst, "bfloat16", 3), rows(bst, "q", 24, dtype, 4)
    check(bst.nt_op, [q, k], dw, ("nn", dw, k), ("tn", dw, q))
    check(bst.nn_op, [w, k], dy, ("nt", dy, k), ("tn", w, dy))
    dy = rows(bst, "kv", 24, dtype, 5)
    check(bst.tn_op, [w, q], dy, ("nt", q, dy), ("nn", w, dy))


# ---- determinism, sizes ----


def print_digest(threads):
    config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=threads)
    with tf.Graph().as_default(), tf.compat.v1.Session(config=config) as session:
        bst = transformer(32, shared=True, heads=2)
        tensors = [
            tf.constant(rows(bst, s, 64, "float16", 1)) for s in ("q", "kv", "kv")
        ]
        w = bst.masked_softmax(bst.query_key_op(*tensors[:2]), 0.125)
        y = bst.weight_value_op(w, tensors[2])
        fetched = session.run([w, y] + tf.gradients(y, tensors))
    print(hashlib.sha1(b"".join(array.tobytes() for array in fetched)).hexdigest())


def test_results_do_not_depend_on_the_number_of_threads():
    """A process has one pool, of the size that its first session asks for."""
    code = "import sys, test_blocksparse_ops as t; t.print_digest(int(sys.argv[1]))"
    here = os.path.dirname(os.path.abspath(__file__))
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([here, os.path.dirname(here)]))
    digests = [
        subprocess.check_output([sys.executable, "-c", code, threads], env=env)
        for threads in ("1", "5")
    ]
    assert digests[0] == digests[1] and len(digests[0].split()[-1]) == 40


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch_gives_empty_results(mode):
    bst = transformer()
    q, k = (rows(bst, side, 8, "float32", 1, batch=0) for side in ("q", "kv"))

    def attend(q, k):
        w = bst.masked_softmax(bst.query_key_op(q, k))
        return [w, bst.weight_value_op(w, k)]

    w, y, dq, dk = evaluate(mode, attend, [q, k], q)
    assert w.shape == (0, 3, bst.blocks, 16, 16)
    assert (y.shape, dq.shape, dk.shape) == (q.shape, q.shape, k.shape)


def test_layout_without_blocks_gives_zeros():
    bst = BlocksparseTransformer(np.zeros((2, 2)), 8, 2)
    q = rows(bst, "q", 8, "float32", 1)
    w, y = evaluate(
        "graph", lambda q: [bst.nt_op(q, q), bst.nn_op(bst.nt_op(q, q), q)], [q]
    )
    assert w.shape == (2, 2, 0, 8, 8)
    assert not y.any() and y.shape == q.shape


def test_shapes_are_known_to_the_graph():
    bst = transformer()
    with tf.Graph().as_default():
        q = tf.compat.v1.placeholder(tf.float32, [None, 48, 24])
        k = tf.compat.v1.placeholder(tf.float32, None)
        w = bst.query_key_op(q, k)
        a = bst.masked_softmax(w)
        assert w.shape.as_list() == a.shape.as_list() == [None, 3, bst.blocks, 16, 16]
        assert bst.weight_value_op(a, k).shape.as_list() == [None, 48, None]
        assert bst.tn_op(a, q).shape.as_list() == [None, 64, 24]


# ---- bad input ----


def example(op):
    """{argument: value} of a valid call of an op."""
    bst = transformer(heads=2)
    w = blocks_of(bst, "bfloat16", 1)
    matmul = dict(
        nt_lut=bst.nt_lut,
        nn_lut=bst.nn_lut,
        tn_lut=bst.tn_lut,
        heads=2,
        blocks=bst.blocks,
        blk_size=16,
        nn_max=bst.nn_max,
        tn_max=bst.tn_max,
    )
    softmax = dict(
        scale=np.float32(1),
        lut=bst.nn_lut,
        blocks=bst.blocks,
        blk_size=16,
        ctx_blks=3,
        lut_max=bst.nn_max,
    )
    q, k = (rows(bst, side, 8, "float32", 1) for side in ("q", "kv"))
    return {
        "blocksparse_transformer_nt": dict(
            matmul, a=q, b=k, CT=tf.bfloat16, ctx_blks_a=3, ctx_blks_b=4
        ),
        "blocksparse_transformer_nn": dict(
            matmul, a=w, b=k, ctx_blks_b=4, ctx_blks_c=3
        ),
        "blocksparse_transformer_tn": dict(
            matmul, a=w, b=q, ctx_blks_b=3, ctx_blks_c=4
        ),
        "blocksparse_masked_softmax": dict(
            softmax, x=w, mask=bst.softmax_mask, T=tf.bfloat16
        ),
        "blocksparse_softmax": dict(softmax, x=w, T=tf.bfloat16),
        "blocksparse_softmax_grad": dict(softmax, dy=w, y=w),
        "bst_partial_autoregressive_mask": dict(
            mask=bst.softmax_mask,
            lut=bst.nt_lut,
            autoregress_at_k=np.int32(5),
            blocks=bst.blocks,
            blk_size=16,
            ctx_blks_k=4,
        ),
    }[op]


def call(op, fetch=True, **changes):
    """Runs an op on a valid example in which `changes` replace inputs or attributes.

    A function among them makes an input that NumPy cannot hold; no `fetch`: the op
    runs, and nothing comes back.
    """
    arguments = dict(example(op), **changes)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        # Through placeholders, so that only the kernel sees the shapes.
        feed = {}
        for name, value in arguments.items():
            if callable(value):
                arguments[name] = tf.compat.v1.placeholder_with_default(value(), None)
            elif isinstance(value, (np.ndarray, np.generic)):
                arguments[name] = tf.compat.v1.placeholder(value.dtype, None)
                feed[arguments[name]] = value
        result = getattr(load_blocksparse_ops(), op)(**arguments)
        return session.run(result if fetch else result.op, feed)


def with_entry(lut, place, entry):
    lut = lut.copy()
    lut[place] = entry
    return lut


BST = transformer(heads=2)
NT, NN, TN, W = BST.nt_lut, BST.nn_lut, BST.tn_lut, blocks_of(BST, "bfloat16", 1)
BLOCKS, ENTRIES = BST.blocks, NN.shape[1]

BAD_MATMULS = [
    (
        "nt",
        dict(a=np.zeros((2, 48), "f")),
        r"a must have shape \[2,48,16\], got \[2,48\]",
    ),
    ("nt", dict(b=np.zeros((2, 64), "f")), r"b must have shape \[batch, length, heads"),
    ("nt", dict(a=np.zeros((1, 48, 16), "f")), r"\[2,48,16\], got \[1,48,16\]"),
    ("nt", dict(a=np.zeros((2, 32, 16), "f")), r"\[2,48,16\], got \[2,32,16\]"),
    ("nt", dict(b=np.zeros((2, 48, 16), "f")), r"\[2,64,16\], got \[2,48,16\]"),
    ("nt", dict(b=np.zeros((2, 64, 12), "f")), r"multiple of 8, got \[2,64,12\]"),
    ("nt", dict(b=np.zeros((2, 64, 0), "f")), r"multiple of 8, got \[2,64,0\]"),
    ("nt", dict(heads=3), "heads=3 .*got .2,64,16."),
    ("nt", dict(blk_size=12), "blk_size must be 8, 16, 32 or 64, got 12"),
    ("nt", dict(nt_lut=NT[0]), r"nt_lut must have shape \[1 or 2, entries, 2\], got"),
    ("nt", dict(nt_lut=NT[:, :, :1]), r"nt_lut must have shape \[1 or 2, entries, 2\]"),
    (
        "nt",
        dict(nt_lut=NT[[0, 1, 1]]),
        r"nt_lut must have shape \[1 or 2, entries, 2\]",
    ),
    (
        "nt",
        dict(nt_lut=NT[:, 1:]),
        f"must have blocks={BLOCKS} entries, got {BLOCKS - 1}",
    ),
    (
        "nt",
        dict(blocks=BLOCKS + 1),
        f"must have blocks={BLOCKS + 1} entries, got {BLOCKS}",
    ),
    (
        "nt",
        dict(nt_lut=with_entry(NT, (1, 2), (3, 0))),
        r"nt_lut\[1, 2\] must be \(-1, -1\) or in \[0, 3\) x \[0, 4\), got \(3, 0\)",
    ),
    ("nt", dict(nt_lut=with_entry(NT, (0, 0), (0, 4))), r"got \(0, 4\)"),
    ("nt", dict(nt_lut=with_entry(NT, (0, 0), (-1, 0))), r"got \(-1, 0\)"),
    (
        "nt",
        dict(nt_lut=with_entry(NT, (0, 0), (2**31 - 1, -(2**31)))),
        r"got \(2147483647",
    ),
    ("nn", dict(a=W[0]), "a must have shape"),
    ("nn", dict(a=W[:, :, 1:]), "a must have shape"),
    ("nn", dict(b=np.zeros((1, 64, 16), "f")), "a must have shape"),
    ("nn", dict(nn_lut=NN[:, :2]), "nn_lut must have at least 3 entries, got 2"),
    ("nn", dict(nn_max=0), r"nn_lut\[0, 0\] must have a size of at most 0, got "),
    ("nn", dict(nn_max=10**6), rf"must have \[0, {ENTRIES}\] entries, got 1000000"),
    (
        "nn",
        dict(nn_lut=with_entry(NN, (1, 0), (-1, 1))),
        rf"nn_lut\[1, 0\] must be an \(offset, size\) in \[3, {ENTRIES}\], got \(-1",
    ),
    ("nn", dict(nn_lut=with_entry(NN, (0, 0), (2, 1))), r"got \(2, 1\)"),
    ("nn", dict(nn_lut=with_entry(NN, (0, 0), (3, -1))), r"got \(3, -1\)"),
    ("nn", dict(nn_lut=with_entry(NN, (0, 0), (ENTRIES, 1))), rf"got \({ENTRIES}, 1\)"),
    (
        "nn",
        dict(nn_lut=with_entry(NN, (0, 0), (2**31 - 1, 2**31 - 1))),
        "got .2147483647",
    ),
    (
        "nn",
        dict(nn_lut=with_entry(NN, (0, 3), (BLOCKS, 0))),
        rf"nn_lut\[0, 3\] must be in \[0, {BLOCKS}\) x \[0, 4\), got \({BLOCKS}, 0\)",
    ),
    ("nn", dict(nn_lut=with_entry(NN, (0, 3), (-1, 0))), r"got \(-1, 0\)"),
    ("nn", dict(nn_lut=with_entry(NN, (0, 3), (0, 4))), r"got \(0, 4\)"),
    ("tn", dict(tn_lut=with_entry(TN, (0, 4), (0, 3))), r"x \[0, 3\), got \(0, 3\)"),
    ("tn", dict(tn_lut=with_entry(TN, (0, 0), (3, 1))), r"tn_lut.0, 0. .*got \(3, 1\)"),
    ("tn", dict(tn_max=0), r"tn_lut\[0, 0\] must have a size of at most 0, got "),
    ("tn", dict(b=np.zeros((2, 64, 16), "f")), r"b must have shape \[2,48,16\], got"),
]


@pytest.mark.parametrize("op, changes, message", BAD_MATMULS)
def test_bad_products_are_refused(op, changes, message):
    op = "blocksparse_transformer_" + op
    call(op)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=message):
        call(op, **changes)


BAD_SOFTMAXES = [
    ("x", dict(x=W[0]), "must have rank 5, .* got "),
    ("x", dict(x=W[:, :, 1:]), "must have shape"),
    ("x", dict(blk_size=8), "must have shape"),
    ("x", dict(blocks=BLOCKS + 1), "must have shape"),
    ("scale", dict(scale=np.zeros(2, "f")), r"scale must have shape \[\], got \[2\]"),
    (
        "lut",
        dict(lut=NN[[0, 1, 1]]),
        r"lut must have shape \[1 or 2, entries, 2\], got",
    ),
    ("lut", dict(lut=NN[:, :2]), "nn_lut must have at least 3 entries, got 2"),
    ("lut", dict(ctx_blks=ENTRIES + 1), "nn_lut must have at least"),
    ("lut", dict(lut_max=1), "must have a size of at most 1, got "),
    ("lut", dict(lut=with_entry(NN, (0, 0), (3, ENTRIES))), r"\(offset, size\) in"),
    ("lut", dict(lut=with_entry(NN, (0, 3), (BLOCKS, 0))), rf"got \({BLOCKS}, 0\)"),
    ("lut", dict(lut=with_entry(NN, (0, 3), (0, -1))), r"got \(0, -1\)"),
    (
        "lut",
        dict(lut=with_entry(NN, (0, 4), NN[0, 3])),
        r"nn_lut\[0\] must list every block at most once, got 0 twice",
    ),
]


@pytest.mark.parametrize("what, changes, message", BAD_SOFTMAXES)
def test_bad_softmaxes_are_refused(what, changes, message):
    for op in ("masked_softmax", "softmax", "softmax_grad"):
        op = "blocksparse_" + op
        call(op)
        if op == "blocksparse_softmax_grad" and what == "x":
            changes = {{"x": "dy"}.get(key, key): changes[key] for key in changes}
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            call(op, **changes)


MASK = BST.softmax_mask

BAD_MASKS = [
    ("blocksparse_masked_softmax", dict(mask=MASK[0]), "mask must have shape"),
    ("blocksparse_masked_softmax", dict(mask=MASK[:, 1:]), "mask must have shape"),
    ("blocksparse_masked_softmax", dict(mask=MASK[:, :, 1:]), "mask must have shape"),
    (
        "blocksparse_masked_softmax",
        dict(mask=MASK[[0, 1, 1]]),
        "mask's heads must be 1 or 2, got 3",
    ),
    (
        "blocksparse_masked_softmax",
        dict(mask=MASK.astype(np.uint8)),
        "mask must be uint16 for blk_size=16, got uint8",
    ),
    (
        "blocksparse_masked_softmax",
        dict(mask=MASK.astype(np.uint64)),
        "mask must be uint16 for blk_size=16, got uint64",
    ),
    (
        "bst_partial_autoregressive_mask",
        dict(mask=MASK.astype(np.uint32)),
        "mask must be uint16 for blk_size=16, got uint32",
    ),
    ("bst_partial_autoregressive_mask", dict(mask=MASK[:, 1:]), "mask must have shape"),
    ("bst_partial_autoregressive_mask", dict(lut=NT[:1]), "lut must have shape"),
    ("bst_partial_autoregressive_mask", dict(lut=NT[:, 1:]), "lut must have shape"),
    (
        "bst_partial_autoregressive_mask",
        dict(lut=with_entry(NT, (0, 0), (0, 4))),
        r"nt_lut\[0, 0\] .*got \(0, 4\)",
    ),
    (
        "bst_partial_autoregressive_mask",
        dict(autoregress_at_k=np.int32(64)),
        r"autoregress_at_key must be in \[0, kv_len=64\), got 64",
    ),
    (
        "bst_partial_autoregressive_mask",
        dict(autoregress_at_k=np.int64(-1)),
        "autoregress_at_key must be in .* got -1",
    ),
    (
        "bst_partial_autoregressive_mask",
        dict(autoregress_at_k=np.zeros(1, np.int32)),
        "autoregress_at_k must have shape",
    ),
]


@pytest.mark.parametrize("op, changes, message", BAD_MASKS)
def test_bad_masks_are_refused(op, changes, message):
    call(op)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        call(op, **changes)


def test_softmax_grad_refuses_another_shape():
    with pytest.raises(tf.errors.InvalidArgumentError, match="y must have shape"):
        call("blocksparse_softmax_grad", y=W[:1])


@pytest.mark.parametrize(
    "name", ["heads", "blocks", "ctx_blks_a", "ctx_blks_b", "nn_max"]
)
def test_negative_attributes_are_refused(name):
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=f"'{name}'"):
        call("blocksparse_transformer_nt", **{name: -1})
