"""Runs the three-op family in TensorFlow, in each of its modes."""

import blocks_oracle as oracle
import numpy as np
import tensorflow as tf
from helpers import assert_close, to_dtype

from sparse_attention.plan import reference

MODES = ["graph"]
if tf.__version__ >= "2":
    MODES += ["eager", "function"]


def evaluate(mode, fn, inputs, output_gradient=None, device=None):
    """The tensors of `fn(*tensors)` as arrays, then the gradients of the inputs if the
    one of the last output is given. All ops run on `device` that can."""

    def work(*tensors):
        if output_gradient is None:
            return list(fn(*tensors))
        if mode == "graph":
            outputs = list(fn(*tensors))
            return outputs + tf.gradients(outputs[-1], tensors, output_gradient)
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            outputs = list(fn(*tensors))
        seed = tf.constant(output_gradient)
        return outputs + tape.gradient(outputs[-1], list(tensors), seed)

    if mode == "graph":
        config = tf.compat.v1.ConfigProto(allow_soft_placement=True)
        with tf.Graph().as_default(), tf.compat.v1.Session(config=config) as session:
            with tf.device(device):
                outputs = work(*map(tf.constant, inputs))
            return session.run(outputs)
    work = tf.function(work) if mode == "function" else work
    with tf.device(device):
        outputs = work(*map(tf.constant, inputs))
    return [tensor.numpy() for tensor in outputs]


# ---- attention ----


def attend(bst, scores=None, weights=None, key=None):
    """`fn(q, k, v)` -> [scores, weights, y], attention in three ops."""

    def pipeline(q, k, v):
        w = bst.query_key_op(q, k, dtype=scores or tf.bfloat16)
        a = bst.masked_softmax(w, 0.25, key, dtype=weights)
        return [w, a, bst.weight_value_op(a, v)]

    return pipeline


def plain_attention(bst, q, k, v, dy, scores, weights, key=None):
    """The three steps in float32 NumPy, rounded where the ops round."""

    def round32(x, dtype):
        return to_dtype(x, dtype).astype(np.float32)

    a = round32(bst.nt_test(q, k), scores)
    a = round32(bst.masked_softmax_test(a, 0.25, key), weights)
    da = round32(bst.nt_test(dy, v), weights)
    dw = round32(bst.masked_softmax_grad_test(da, a, 0.25), weights)
    dw = round32(dw, scores)
    return (
        bst.nn_test(a, v),
        bst.nn_test(dw, k),
        bst.tn_test(dw, q),
        bst.tn_test(a, dy),
    )


def check_attention(bst, mode, dtype, scores=None, weights=None, key=None, device=None):
    """Forward and backward against the float64 oracle; returns the ops' dtypes."""
    random = np.random.RandomState(5)
    n_ctx = bst.ctx_blks_q * bst.blk_size
    tensors = random.standard_normal((4, 2, n_ctx, bst.heads * 16))
    q, k, v, dy = (to_dtype(x, dtype) for x in tensors)
    pipeline = attend(bst, scores, weights, key)
    w, a, *got = evaluate(mode, pipeline, [q, k, v], dy, device)

    def split(x):
        return x.reshape(2, n_ctx, bst.heads, 16).astype(np.float64)

    mask = oracle.attends(bst, key)
    exact = reference.attention_fwd(split(q), split(k), split(v), mask)[:1]
    exact += reference.attention_bwd(split(q), split(k), split(v), mask, split(dy))
    dtypes = w.dtype.name, a.dtype.name
    plain = plain_attention(bst, *(x.astype("f") for x in (q, k, v, dy)), *dtypes, key)
    for one, exact64, one_plain, factor in zip(got, exact, plain, (2, 3, 3, 3)):
        one_plain = to_dtype(one_plain, dtype)
        assert_close(one, exact64.reshape(one.shape), one_plain, factor)
    return dtypes
