"""Attention of one query of each sequence, in TensorFlow's own ops, as decoding needs it.

One query is bound by the bytes that it reads: its keys are gathered, and the fused op,
which works on tiles of queries, took twice as long.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from .fallback_rule import scores
from .score_rule import as_floats, score_rule


def attention_of_one_query(
    q: Any,
    k: Any,
    v: Any,
    q_rows: Any,
    kv_rows: Any,
    heads: int,
    *,
    logit_softcap: float | None = None,
    alibi_slopes: Any = None,
    relative_bias: Any = None,
    sinks: Any = None,
) -> Any:
    """`block_sparse_attention` of a query at `q_rows` to keys that are gathered.

    Args:
      q: [batch, heads * head_dim].
      k, v: [batch, lists, keys, head_dim]; head h reads list floor(h / (heads / lists)).
      q_rows: int32 [batch], the row of each query.
      kv_rows: int32 [batch or 1, lists or 1, keys], the row of each key; negative: it is
        none, whatever k has there that is finite.
      heads: Number of query heads.
      logit_softcap, alibi_slopes, relative_bias, sinks: As for the op.

    Returns:
      Like q.

    Numerics: Scores, softmax and weighted sum in float32.
    """
    batch, lists, keys, head_dim = q.shape[0], k.shape[1], tf.shape(k)[2], k.shape[3]
    by_head = [batch, lists, heads // lists]
    k, v = tf.cast(k, tf.float32), tf.cast(v, tf.float32)
    s = tf.matmul(
        tf.reshape(tf.cast(q, tf.float32), [*by_head, head_dim]), k, transpose_b=True
    )
    rule = score_rule(
        *(q, k, heads),
        logit_softcap=logit_softcap,
        alibi_slopes=alibi_slopes,
        relative_bias=relative_bias,
    )
    head = np.arange(heads, dtype=np.int32).reshape([1, *by_head[1:], 1])
    apart = q_rows[:, None, None, None] - kv_rows[:, :, None]
    is_key = kv_rows[:, :, None] >= 0
    s = scores(rule, s * head_dim**-0.5, head, apart, heads)
    s = tf.where(is_key, s, s.dtype.min)
    if sinks is None:
        p = tf.nn.softmax(s)
    else:  # a score more, whose weight is lost
        sinks = as_floats("sinks", sinks, [heads], "[heads]")
        sinks = tf.reshape(sinks, [1, *by_head[1:], 1])
        s = tf.concat([s, tf.broadcast_to(sinks, [*by_head, 1])], axis=3)
        p = tf.nn.softmax(s)[..., :keys]
    p = tf.where(is_key, p, 0.0)  # no key at all: o = 0
    return tf.cast(tf.reshape(tf.matmul(p, v), q.shape), q.dtype)
