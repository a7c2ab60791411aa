"""block_sparse_attention's numbers, plans and gradients, in all of TensorFlow's modes."""

import gc
import weakref
from collections import namedtuple

import numpy as np
import pytest
import tensorflow as tf
from helpers import DTYPES, PATTERNS, random_inputs
from tensorflow.python.eager import context
from tf_helpers import (
    MODES,
    assert_same_bits,
    attention_on,
    check_attention,
    merged,
    pattern,
    random_qkv,
    run,
    run_with_gradients,
)

import sparse_attention as sa
from sparse_attention.native import abi, loader
from sparse_attention.native.cuda import devices
from sparse_attention.ops import signature
from sparse_attention.ops.plan_tensors import kept

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
    arrays = random_qkv(block_mask, heads=4)
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
    q, k, v = random_qkv(block_mask)
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


# ---- plans as tensors ----


def test_plan_is_made_once_for_eager_calls_and_dies_with_its_block_mask():
    with context.eager_mode():
        block_mask = sa.BlockMask(sa.all_layout(64, 8), sa.causal_mask(), 8)
        arrays = random_qkv(block_mask)
        attention = attention_on(block_mask, 2)
        attention(*arrays)
        (plan,) = kept(block_mask).values()
        tensor = weakref.ref(plan.inputs[1])
        attention(*arrays)
        assert list(kept(block_mask).values()) == [plan]
        del plan, attention, block_mask
        gc.collect()
        assert tensor() is None


def test_clear_plans_frees_all_and_calls_work_as_before():
    arrays = random_qkv(pattern("local"))

    def is_freed(dead):
        assert dead() is not None
        sa.clear_plans()
        gc.collect()
        return dead() is None

    def first_kept(owner):
        made = next(iter(kept(owner).values()))
        return weakref.ref(made.inputs[1] if hasattr(made, "inputs") else made)

    with context.eager_mode():
        block_mask = sa.BlockMask(sa.all_layout(72, 8), sa.causal_mask(), 8)
        attention = attention_on(block_mask, 2)
        function = tf.function(attention)
        want = [x.numpy() for x in attention(*arrays)]
        assert_same_bits([x.numpy() for x in function(*arrays)], want)
        assert is_freed(first_kept(block_mask))
        table = sa.get_blocksparse_obj(64, 2, "all", 8)
        table.get_lut_constants()
        assert is_freed(first_kept(table))
        cached = weakref.ref(pattern("local"))
        assert is_freed(cached)
        table.get_lut_constants()
        for again in (attention, function, tf.function(attention)):
            assert_same_bits([x.numpy() for x in again(*arrays)], want)


def test_a_graph_does_not_keep_a_block_mask():
    with tf.Graph().as_default() as graph:
        block_mask = sa.BlockMask(sa.all_layout(64, 8), sa.causal_mask(), 8)
        o, _ = attention_on(block_mask, 2)(*map(tf.constant, random_qkv(block_mask)))
        dead = weakref.ref(block_mask)
        del block_mask
        gc.collect()
        assert dead() is None
        with tf.compat.v1.Session(graph=graph) as session:
            assert session.run(o).shape == (2, 64, 16)


def test_plan_of_a_graph_lies_on_the_device_of_its_op():
    block_mask = pattern("local")
    arrays = random_qkv(block_mask)
    scopes = ["/cpu:0", "/cpu:1", lambda op: "/cpu:2", None]
    with tf.Graph().as_default() as graph:
        q, k, v = map(tf.constant, arrays)
        lengths = tf.constant([72, 5])
        for device in [*scopes, *scopes]:  # the second time nothing is made anew
            with tf.compat.v1.device(device):
                sa.block_sparse_attention(q, k, v, block_mask, 2)
                sa.block_sparse_attention(q, k, v, block_mask, 2, kv_lengths=lengths)
        readers = [
            op for op in graph.get_operations() if op.type == "BlockSparseAttention"
        ]
        plans = {op.device: set() for op in readers}
        for op in readers:
            assert {x.device for x in op.inputs[3:]} == {op.device}
            plans[op.device] |= {x.name for x in op.inputs[4:]}
        assert len(readers) == 16 and len(plans) == 4
        assert [len(names) for names in plans.values()] == 4 * [9]


# ---- plans for the GPUs at hand ----

Gpu = namedtuple("Gpu", "name capability")
GPUS = [Gpu(f"/physical_device:GPU:{i}", x) for i, x in enumerate([(7, 0), (9, 0)])]


@pytest.mark.parametrize("visible", [[], [0], [1], [0, 1]])
@pytest.mark.parametrize("has_details", [True, False])
def test_tiles_follow_the_gpus_that_tensorflow_sees(visible, has_details, monkeypatch):
    config = tf.config.experimental
    seen = [GPUS[i] for i in visible]
    archs = {(70, 90)[i] for i in visible}
    monkeypatch.setattr(config, "get_visible_devices", lambda kind: seen)
    if has_details:
        details = lambda gpu: {"compute_capability": gpu.capability}  # noqa: E731
        monkeypatch.setattr(config, "get_device_details", details, raising=False)
    else:
        monkeypatch.delattr(config, "get_device_details", raising=False)
        driver = (("a V100", 70), ("an H100", 90))
        monkeypatch.setattr(devices, "devices", lambda: driver)
    assert devices.visible_archs() == archs
    block_mask = sa.BlockMask(sa.all_layout(256, 32), sa.causal_mask(), 32)
    with tf.Graph().as_default():
        x = tf.zeros([1, 256, 256])
        op = sa.block_sparse_attention(x, x, x, block_mask, 1).op
        tiles = op.get_attr("block_q"), op.get_attr("tile_kv")
    each = [
        abi.plans(
            loader.attention_ops().core, {arch}, "float32", (256, 256), block_mask, 1
        )
        for arch in archs
    ]
    smallest = [min(sizes) for sizes in zip(*((q[0], kv[0]) for q, kv in each))]
    assert list(tiles) == (smallest if archs else [block_mask.tiles()[0], 0])


@pytest.mark.parametrize("mode", MODES)
def test_the_driver_is_not_touched_where_tensorflow_sees_no_gpu(mode, monkeypatch):
    def load(name, *_):
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr(tf.config.experimental, "get_visible_devices", lambda kind: [])
    monkeypatch.setattr(devices.ctypes, "CDLL", load)
    devices.driver_version.cache_clear()
    devices.devices.cache_clear()
    block_mask = sa.BlockMask(sa.all_layout(64, 8), sa.causal_mask(), 8)
    q, k, v = random_qkv(block_mask)
    d_outputs = [np.ones_like(q), np.ones([2, 2, 64], np.float32)]
    run_with_gradients(attention_on(block_mask, 2), [q, k, v], d_outputs, mode)


# ---- plans as constants ----


def test_plan_is_one_constant_of_a_graph_wherever_it_is_used():
    block_mask = pattern("local")
    arrays = random_qkv(block_mask)

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
        attention_on(block_mask, 2)(*map(tf.constant, random_qkv(block_mask)))
    dead = weakref.ref(graph)
    del graph
    gc.collect()
    assert dead() is None


def test_function_captures_nothing():
    block_mask = pattern("fixed")
    with context.eager_mode():
        spec = tf.TensorSpec([2, 72, 64])
        attention = attention_on(block_mask, 4)
        attention(
            *random_qkv(block_mask, heads=4, head_dim=16)
        )  # fills the eager cache
        function = tf.function(attention).get_concrete_function(spec, spec, spec)
        assert not function.captured_inputs


# ---- gradients ----


def test_the_op_and_its_gradient_share_what_the_signature_lists():
    attention = attention_on(pattern("local"), 2)
    with tf.Graph().as_default() as graph:
        x = tf.zeros([2, 72, 16])
        tf.gradients(attention(x, x, x), x)
        found = {op.type: op for op in graph.get_operations()}
    forward, backward = found["BlockSparseAttention"], found["BlockSparseAttentionGrad"]
    for op, own in ((forward, 3), (backward, 7)):
        names = [argument.name for argument in op.op_def.input_arg[own:]]
        assert tuple(names) == (*signature.SHARED_INPUTS, "rule_inputs")
        names = [attribute.name for attribute in op.op_def.attr]
        rule = "rule_types", *signature.RULE_ATTRIBUTES, *signature.LENGTH_ATTRIBUTES
        assert sorted(names) == sorted(("T", *signature.ATTRIBUTES, *rule))
    assert list(forward.inputs)[3:] == list(backward.inputs)[7:]


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
        run(second, *random_qkv(block_mask), mode=mode)


def test_tape_outside_of_a_function():
    block_mask = pattern("strided")
    arrays = random_qkv(block_mask)
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
