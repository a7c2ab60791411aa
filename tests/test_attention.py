"""block_sparse_attention and the two `*_impl`s, in all of TensorFlow's modes."""

import gc
import os
import re
import sys
import weakref

import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    assert_close,
    plain_attention_bwd,
    plain_attention_fwd,
    random_inputs,
)
from tensorflow.python.eager import context
from tf_helpers import (
    MODES,
    assert_same_bits,
    check_attention,
    merged,
    run,
    run_script,
    run_with_gradients,
)

import sparse_attention as sa
from sparse_attention import _ops
from sparse_attention.reference import attention_bwd, attention_fwd

IS_TF1 = tf.__version__.startswith("1.")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATTERNS = ("all", "local", "strided", "fixed")
DTYPES = ("float32", "float16", "bfloat16")


def attention_on(block_mask, heads, **options):
    """(q, k, v) -> o, lse."""

    def attention(q, k, v):
        return sa.block_sparse_attention(
            q, k, v, block_mask, heads, return_lse=True, **options
        )

    return attention


def pattern(attn_mode, q_len=72, heads=4, block_size=8, **options):
    ctx = 3 if attn_mode == "strided" else 4 * block_size
    return sa.pattern_block_mask(attn_mode, q_len, heads, block_size, ctx, **options)


def qkv(block_mask, heads=2, head_dim=8, batch=2, dtype="float32", seed=0):
    inputs = random_inputs(
        seed,
        batch,
        block_mask.q_len,
        block_mask.kv_len,
        heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    return [merged(x) for x in inputs[:3]]


# ---- numbers ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("attn_mode", PATTERNS)
def test_attention_matches_oracle_in_every_pattern(attn_mode, block_size, dtype):
    q_len = 2 * block_size + 5 if block_size > 32 else 7 * block_size + 3
    head_dim, head_dim_v = {8: (32, 32), 16: (64, 128), 64: (128, 64)}.get(
        block_size, (64, 64)
    )
    block_mask = pattern(attn_mode, q_len, 4, block_size)
    check_attention(
        attention_on(block_mask, 4),
        block_mask,
        heads=4,
        batch=1,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
    )


@pytest.mark.parametrize("mode", MODES)
def test_attention_matches_oracle_in_every_mode_with_every_option(mode):
    # Heads with different block counts, head 1 with empty rows, q_len != kv_len.
    layout = np.array([[[1, 1, 1, 0], [0, 1, 1, 1]], [[0, 0, 0, 0], [1, 0, 0, 0]]] * 2)
    mask = sa.Mask(lambda head, q_idx, kv_idx: (q_idx + kv_idx + head) % 3 > 0)
    block_mask = sa.BlockMask(layout, mask, 16, q_len=23, kv_len=61)
    options = {"kv_heads": 2, "kv_lengths": [50, 0], "softmax_scale": 0.3}
    check_attention(
        attention_on(block_mask, 4, **options),
        block_mask,
        mode,
        with_dlse=True,
        heads=4,
        head_dim=40,
        head_dim_v=24,
        **options,
    )


@pytest.mark.parametrize("attn_mode", PATTERNS)
def test_modes_agree_bitwise(attn_mode):
    block_mask = pattern(attn_mode)
    arrays = qkv(block_mask, heads=4)
    do, dlse = np.ones_like(arrays[0]), np.ones([2, 4, 72], np.float32)
    attention = attention_on(block_mask, 4)
    graph, eager, function, again = (
        run_with_gradients(attention, arrays, [do, dlse], mode)
        for mode in MODES + MODES[:1]
    )
    assert_same_bits(graph, eager)
    assert_same_bits(graph, function)
    assert_same_bits(graph, again)


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone_has_a_gradient(output):
    block_mask = pattern("all")
    inputs = random_inputs(0, 2, 72, heads=2)
    do, dlse = np.zeros_like(inputs.do), np.zeros_like(inputs.dlse)
    if output == 0:
        do = inputs.do
    else:
        dlse = inputs.dlse
    attention = attention_on(block_mask, 2)
    for mode in MODES:
        _, got = run_with_gradients(
            lambda q, k, v: attention(q, k, v)[output : output + 1],
            [merged(x) for x in inputs[:3]],
            [merged(do) if output == 0 else dlse],
            # fmt: skip
            mode,
        )
        _, want = run_with_gradients(
            attention, [merged(x) for x in inputs[:3]], [merged(do), dlse]
        )
        assert_same_bits(got, want)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_masked_keys_cannot_leak(value):
    block_mask = sa.BlockMask(
        np.ones([1, 1]), sa.causal_mask(), 16, q_len=16, kv_len=16
    )
    q, k, v = qkv(block_mask)
    do = np.ones_like(q)
    bad_k, bad_v = k.copy(), v.copy()
    bad_k[:, 9:], bad_v[:, 9:] = value, value

    def first_nine(q, k, v):
        return [sa.block_sparse_attention(q, k, v, block_mask, 2)[:, :9]]

    clean = run_with_gradients(first_nine, [q, k, v], [do[:, :9]])
    dirty = run_with_gradients(first_nine, [q, bad_k, bad_v], [do[:, :9]])
    assert_same_bits(clean[0], dirty[0])


def test_extreme_float16_scores_give_no_nan():
    block_mask = pattern("local", 64, 2)
    q, k, v = (np.full([1, 64, 16], x, np.float16) for x in (210, 210, 1))
    k[:, ::3] *= -1  # scores of about -125,000 and 125,000
    (o,), grads = run_with_gradients(
        lambda q, k, v: [sa.block_sparse_attention(q, k, v, block_mask, 2)],
        [q, k, v],
        [np.ones_like(v)],
    )
    np.testing.assert_array_equal(o[:, 1:], np.ones_like(o[:, 1:]))
    assert all(np.isfinite(grad).all() for grad in grads)


# ---- arguments ----


def test_attention_accepts_arrays_lists_and_variables():
    block_mask = sa.BlockMask(np.ones([1, 1]), None, 8)
    arrays = qkv(block_mask)
    want = run(lambda *x: sa.block_sparse_attention(*x, block_mask, 2), *arrays)

    def from_others():
        q, k, v = arrays
        k, v = k.tolist(), tf.compat.v1.get_variable("v", initializer=v)
        int64 = np.array([8, 8])
        return sa.block_sparse_attention(q, k, v, block_mask, 2, kv_lengths=int64)

    assert_same_bits(run(from_others), want)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_batch_may_be_dynamic_and_empty(mode, batch):
    block_mask = pattern("local")
    arrays = qkv(block_mask, batch=3)
    do = np.ones_like(arrays[0])
    attention = attention_on(block_mask, 2)
    (want_o, want_lse), want = run_with_gradients(
        attention, arrays, [do, np.zeros([3, 2, 72], np.float32)]
    )

    def with_unknown_batch(*tensors):
        if mode != "eager":
            tensors = [
                tf.compat.v1.placeholder_with_default(x, [None, 72, 16])
                for x in tensors
            ]
        o, lse = attention(*tensors)
        assert mode == "eager" or o.shape.as_list() == [None, 72, 16]
        assert mode == "eager" or lse.shape.as_list() == [None, 2, 72]
        return o, lse

    (o, lse), got = run_with_gradients(
        with_unknown_batch,
        [x[:batch] for x in arrays],
        [do[:batch], np.zeros([batch, 2, 72], np.float32)],
        mode,
    )
    assert_same_bits([o, lse], [want_o[:batch], want_lse[:batch]])
    assert_same_bits(got, [x[:batch] for x in want])


def test_one_function_serves_every_batch():
    block_mask = pattern("all")
    with context.eager_mode():
        traces = []

        @tf.function(input_signature=[tf.TensorSpec([None, 72, 16])] * 3)
        def attention(q, k, v):
            traces.append(1)
            return sa.block_sparse_attention(q, k, v, block_mask, 2)

        for batch in (2, 0, 5):
            arrays = qkv(block_mask, batch=batch)
            got = attention(*map(tf.constant, arrays)).numpy()
            want = run(lambda *x: sa.block_sparse_attention(*x, block_mask, 2), *arrays)
            assert_same_bits(got, want)
    assert len(traces) == 1


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


GOOD = {
    "q": zeros(2, 16, 32),
    "k": zeros(2, 24, 32),
    "v": zeros(2, 24, 32),
    "block_mask": sa.BlockMask(np.ones([1, 2, 3]), None, 8),
    "heads": 4,
}
TWO_HEADS = sa.BlockMask(np.ones([2, 2, 3]), None, 8)


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (ValueError, "q must have rank 3, .*, got shape (2, 16)", {"q": zeros(2, 16)}),
        (ValueError, "v must have rank 3", {"v": zeros(2, 24, 4, 8)}),
        (TypeError, "q must be one of float32, float16, bfloat16, got float64",
         {"q": zeros(2, 16, 32, dtype=np.float64)}),
        (TypeError, "q must be one of .*, got int32",
         {"q": zeros(2, 16, 32, dtype=np.int32)}),
        (TypeError, "k must have q's dtype float32, got float16",
         {"k": zeros(2, 24, 32, dtype=np.float16)}),
        (ValueError, "q must have time = block_mask.q_len = 16, got shape (2, 17, 32)",
         {"q": zeros(2, 17, 32)}),
        (ValueError, "v must have time = block_mask.kv_len = 24, got shape (2, 16, 32)",
         {"v": zeros(2, 16, 32)}),
        (ValueError, "q must have width = 3 heads .* got shape (2, 16, 32)",
         {"heads": 3}),
        (ValueError, "q must have width = 8 heads .* multiple of 8 and at most 256",
         {"heads": 8}),
        (ValueError, "q must have width = 1 heads .* got shape (2, 16, 264)",
         {"q": zeros(2, 16, 264), "heads": 1}),
        (ValueError, "q must have width", {"q": zeros(2, 16, 0)}),
        (ValueError, "k must have q's head dim 8, got 16", {"k": zeros(2, 24, 64)}),
        (ValueError, "same batch, got [2, 3, 2]", {"k": zeros(3, 24, 32)}),
        (ValueError, "heads must be a positive integer, got 0", {"heads": 0}),
        (ValueError, "heads must be a positive integer, got 2.0", {"heads": 2.0}),
        (ValueError, "kv_heads must divide heads=4, got 3", {"kv_heads": 3}),
        (ValueError, "block_mask must have 1 head or heads=4, got 2",
         {"block_mask": TWO_HEADS}),
        (TypeError, "block_mask must be a BlockMask, got ndarray",
         {"block_mask": np.ones([1, 2, 3])}),
        (TypeError, "softmax_scale must be a number, got 'big'",
         {"softmax_scale": "big"}),
        (TypeError, "kv_lengths must be int32, got float32",
         {"kv_lengths": [1.0, 2.0]}),
        (ValueError, "kv_lengths must have shape [batch] = (2,), got (3,)",
         {"kv_lengths": [1, 2, 3]}),
        (ValueError, "kv_lengths must have shape", {"kv_lengths": [[1, 2]]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_bad_input_is_refused(mode, error, message, changes):
    message = re.sub(r"([()\[\]])", r"\\\1", message)
    with pytest.raises(error, match=message):
        run(lambda: sa.block_sparse_attention(**{**GOOD, **changes}), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv_lengths", [[-1, 3], [3, 25]])
def test_lengths_out_of_range_are_refused(mode, kv_lengths):
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"must be in \[0, kv_len=24\]"
    ):
        run(
            lambda x: sa.block_sparse_attention(**GOOD, kv_lengths=x),
            np.array(kv_lengths, np.int32),
            mode=mode,
        )


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("kv_indptr", lambda x: x[1:], "was the plan made for this length"),
        ("kv_indptr", lambda x: x.reshape(-1), "was the plan made for this length"),
        ("kv_indices", lambda x: x[:, :3], "kv_indices must have shape"),
        ("kv_indices", lambda x: x + 1, r"kv_indices\[0\] must be in"),
        ("mask_ids", lambda x: x[1:], "mask_ids must have shape"),
        ("mask_bits", lambda x: x[:, 1:], "mask_bits must have shape"),
    ],
)
def test_op_refuses_bad_plans(name, change, message):
    """A saved graph may hold anything; integers are 4 bytes each."""
    block_mask = pattern("local")
    tiles = block_mask.tiles()
    plan = {
        n: x if x.dtype == np.uint8 else x.view(np.uint8).reshape(-1, 4)
        for n, x in zip(tiles._fields[2:], tiles[2:])
    }
    plan[name] = change(plan[name])
    none = ("tile_blocks", "q_indptr", "q_indices", "kv_mask_ids", "kv_mask_bits")
    plan.update((n, np.zeros(0, np.uint8)) for n in none)
    attributes = {"heads": 2, "kv_heads": 2, "softmax_scale": 1.0, "row_stride": 1}
    attributes.update(block_q=tiles.block_q, block_kv=tiles.block_kv, tile_kv=0)
    op = _ops.attention_ops().block_sparse_attention
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        run(
            lambda q, k, v: op(q, k, v, np.zeros(0, np.int32), **plan, **attributes),
            *qkv(block_mask),
        )


def test_unknown_time_and_width_are_refused():
    for attention, shape, message in (
        ("block", [None, None, 32], "q must have a time dimension that is known"),
        ("impl", [None, None, 32], "q must have a time dimension that is known"),
        ("block", [None, 16, None], "q must have width = 4 heads"),
        ("block", None, "q must have rank 3"),
        ("impl", None, "q must have rank 3"),
    ):
        with tf.Graph().as_default(), pytest.raises(ValueError, match=message):
            q = tf.compat.v1.placeholder(tf.float32, shape)
            if attention == "block":
                sa.block_sparse_attention(**{**GOOD, "q": q})
            else:
                sa.blocksparse_attention_impl(q, q, q, 4, "all")


@pytest.mark.parametrize(
    "message, options",
    [
        ("attn_mode must be 'all', 'local', 'strided' or 'fixed', got 'dense'",
         {"attn_mode": "dense"}),
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
    x = zeros(2, 64, 32)
    with pytest.raises(ValueError, match=message):
        run(lambda x: getattr(sa, name)(x, x, x, 4, blocksize=8, **options), x)


def test_bad_block_size_is_refused():
    x = zeros(2, 64, 32)
    with pytest.raises(ValueError, match="block_size must be one of .* got 24"):
        run(lambda x: sa.blocksparse_attention_impl(x, x, x, 4, "all", blocksize=24), x)


# ---- the seed's two functions ----


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
        want, plain = (
            [fwd(*inputs[:3], mask)[0], *bwd(*inputs[:3], mask, inputs.do)]
            for fwd, bwd in (
                (attention_fwd, attention_bwd),
                (plain_attention_fwd, plain_attention_bwd),
            )
        )
        for i, (g, w, p) in enumerate(zip([o, *grads], want, plain)):
            assert_close(g.reshape(w.shape), w, p, 2 if i == 0 else 3)


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


# ---- plans as tensors ----


def test_plan_is_made_once_for_eager_calls_and_dies_with_its_block_mask():
    with context.eager_mode():
        block_mask = sa.BlockMask(sa.all_layout(64, 8), sa.causal_mask(), 8)
        arrays = qkv(block_mask)
        attention = attention_on(block_mask, 2)
        attention(*arrays)
        module = sys.modules["sparse_attention.attention"]
        (plan,) = module._eager_plans[block_mask].values()
        arrays_of_plan = weakref.ref(plan[2][1])
        attention(*arrays)
        assert list(module._eager_plans[block_mask].values()) == [plan]
        del plan, attention, block_mask
        gc.collect()
        assert arrays_of_plan() is None


def test_plan_is_one_constant_of_a_graph_wherever_it_is_used():
    block_mask = pattern("local")
    arrays = qkv(block_mask)

    def in_loop_and_branch(q, k, v):
        def attention(x):
            return sa.block_sparse_attention(x, k, v, block_mask, 2)

        x = tf.cond(tf.reduce_sum(q) > np.inf, lambda: attention(q), lambda: q)
        _, x = tf.while_loop(
            lambda i, x: i < 2, lambda i, x: (i + 1, attention(x)), (0, x)
        )
        x = attention(x)
        shapes = [op.outputs[0].shape for op in tf.compat.v1.get_default_graph().get_operations()
                  if op.type == "Const" and op.outputs[0].dtype == tf.uint8]  # fmt: skip
        assert len(shapes) == 9  # each input of the plan once
        return x

    def unrolled(q, k, v):
        for _ in range(3):
            q = sa.block_sparse_attention(q, k, v, block_mask, 2)
        return q

    assert_same_bits(run(in_loop_and_branch, *arrays), run(unrolled, *arrays))


def test_graphs_are_freed():
    block_mask = pattern("local")
    graph = tf.Graph()
    with graph.as_default():
        attention_on(block_mask, 2)(*map(tf.constant, qkv(block_mask)))
    dead = weakref.ref(graph)
    del graph
    gc.collect()
    assert dead() is None


def test_function_captures_nothing():
    block_mask = pattern("fixed")
    with context.eager_mode():
        spec = tf.TensorSpec([2, 72, 64])
        attention = attention_on(block_mask, 4)
        attention(*qkv(block_mask, heads=4, head_dim=16))  # fills the eager cache
        function = tf.function(attention).get_concrete_function(spec, spec, spec)
        assert not function.captured_inputs


# ---- gradients ----


@pytest.mark.parametrize("mode", MODES)
def test_second_derivative_is_refused(mode):
    block_mask = pattern("all")

    def second(q, k, v):
        if mode == "graph":
            o = sa.block_sparse_attention(q, k, v, block_mask, 2)
            (dq,) = tf.gradients(o, q)
            return tf.gradients(dq, q)
        with tf.GradientTape() as outer:
            outer.watch(q)
            with tf.GradientTape() as inner:
                inner.watch(q)
                o = sa.block_sparse_attention(q, k, v, block_mask, 2)
            dq = inner.gradient(o, q)
        return outer.gradient(dq, q)

    with pytest.raises(NotImplementedError, match="first derivative only"):
        run(second, *qkv(block_mask), mode=mode)


def test_tape_outside_of_a_function():
    block_mask = pattern("strided")
    arrays = qkv(block_mask)
    attention = attention_on(block_mask, 2)
    dlse = np.ones([2, 2, 72], np.float32)
    _, want = run_with_gradients(attention, arrays, [np.ones_like(arrays[0]), dlse])
    with context.eager_mode():
        tensors = list(map(tf.constant, arrays))
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            o, lse = tf.function(attention)(*tensors)
            loss = tf.reduce_sum(o) + tf.reduce_sum(lse)
        got = [grad.numpy() for grad in tape.gradient(loss, tensors)]
    assert_same_bits(got, want)


# ---- saved graphs ----

LOAD = """
import sys
import numpy as np
import tensorflow as tf
import sparse_attention

kind, folder = sys.argv[1:]
arrays = dict(np.load(folder + "/arrays.npz"))
want, q, k, v = (arrays[name] for name in ("want", "q", "k", "v"))
sparse_attention.load_ops()
if kind == "module":
    loaded = tf.saved_model.load(folder + "/model")
    q, k, v = map(tf.constant, (q, k, v))
    with tf.GradientTape() as tape:
        tape.watch([q, k, v])
        o = loaded.attention(q, k, v)
    got = [x.numpy() for x in [o, *tape.gradient(o, [q, k, v])]]
else:
    tf.compat.v1.disable_eager_execution()
    with tf.compat.v1.Session() as session:
        tf.compat.v1.saved_model.load(session, ["serve"], folder + "/model")
        tensors = [session.graph.get_tensor_by_name(n + ":0") for n in "oqkv"]
        grads = tf.gradients(tensors[0], tensors[1:])
        got = session.run([tensors[0], *grads], dict(zip(tensors[1:], (q, k, v))))
for g, name in zip(got, ("want", "dq", "dk", "dv")):
    assert g.tobytes() == arrays[name].tobytes(), name
print("same bits", len(got))
"""


@pytest.mark.parametrize("kind", ["graph"] if IS_TF1 else ["graph", "module"])
def test_saved_model_runs_in_a_new_process_with_gradients(kind, tmp_path):
    block_mask = pattern("fixed")
    q, k, v = qkv(block_mask, heads=4)
    model = str(tmp_path / "model")

    def attention(q, k, v):
        return sa.block_sparse_attention(q, k, v, block_mask, 4, name="o")

    (o,), grads = run_with_gradients(
        lambda *x: [attention(*x)], [q, k, v], [np.ones_like(q)]
    )
    names = ("q", "k", "v", "want", "dq", "dk", "dv")
    np.savez(str(tmp_path / "arrays.npz"), **dict(zip(names, [q, k, v, o, *grads])))
    if kind == "module":
        with context.eager_mode():
            module = tf.Module()
            spec = tf.TensorSpec([None, 72, 32])
            module.attention = tf.function(attention, input_signature=[spec] * 3)
            tf.saved_model.save(module, model)
    else:
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            inputs = {
                name: tf.compat.v1.placeholder(tf.float32, [None, 72, 32], name)
                for name in "qkv"
            }
            outputs = {"o": attention(**inputs)}
            tf.compat.v1.saved_model.simple_save(session, model, inputs, outputs)
    assert run_script(LOAD, kind, tmp_path) == "same bits 4\n"


# ---- the example ----

EXAMPLE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import attention

print(attention.main())
attention.PATTERNS = {"local": attention.PATTERNS["local"]}
right = attention.blocksparse_attention_impl
for shift in (1e-4, float("nan")):
    attention.blocksparse_attention_impl = lambda *a, **k: right(*a, **k) + shift
    print(attention.main())
"""


def test_example_is_right_and_tells_a_wrong_result():
    lines = run_script(EXAMPLE, f"{ROOT}/examples").splitlines()
    assert [line.split()[0] for line in lines[2:6]] == list(PATTERNS)
    assert lines[6:8] == ["all right", "0"]
    assert [x for x in lines if x.startswith("WRONG") or x == "1"] == 2 * [
        "WRONG: a difference is above its tolerance",
        "1",
    ]
