"""A `ScoreRule` in TensorFlow's own ops, for the pairs of tiles and blocks of `fallback`.

n counts pairs of a q tile and a kv block; "by head" tensors are [batch or 1, heads or 1,
len], of a row of each query or key.
"""

import numpy as np
import tensorflow as tf

from ..plan.dropout import threshold

_MASK = 0xFFFFFFFF


def exist_for_any(exists, rule):
    """Takes from `exists`, bool [..., kv_len, heads, 1], the keys that are padding."""
    mask = rule.inputs.get("mask")
    if mask is not None and mask.shape.as_list()[1:3] == [1, 1]:
        exists &= mask[:, 0, 0, :, None, None]
    if "kv_segments" in rule.inputs:
        exists &= rule.inputs["kv_segments"][:, :, None, None] >= 0
    return exists


def scores(rule, s, head, apart, heads):
    """Scores under the soft cap and the biases of a `ScoreRule`.

    Args:
      s: float32, of any shape.
      head: int, the head of each query; s and it broadcast.
      apart: int, the row of each query less that of the key; s and it broadcast.
      heads: Query heads.
    """
    cap, inputs = rule.logit_softcap, rule.inputs
    head, apart = tf.cast(head, tf.int32), tf.cast(apart, tf.int32)
    if cap:
        s = cap * tf.tanh(s / cap)
    if "alibi_slopes" in inputs:
        slopes = tf.gather(inputs["alibi_slopes"], head)
        s -= slopes * tf.cast(tf.abs(apart), tf.float32)
    if "relative_bias" in inputs:
        bias = inputs["relative_bias"] + tf.zeros([heads, 1])
        last = tf.shape(bias)[1] - 1
        index = tf.clip_by_value(apart + last // 2, 0, last)
        index, head = index + tf.zeros_like(head), head + tf.zeros_like(index)
        s += tf.gather_nd(bias, tf.stack([head, index], axis=-1))
    return s


class PlacedRule:
    """A `ScoreRule` where the scores are [n, batch, tile_q, block_size].

    Args:
      rule: `ScoreRule`.
      pairs: `fallback.Pairs`.
      heads: Query heads.
      batch: int32 tensor.
    """

    def __init__(self, rule, pairs, heads, batch):
        self.rule, self.inputs, self.heads, self.batch = rule, rule.inputs, heads, batch
        self.head, tile = np.divmod(pairs.q_tile, len(pairs.q_rows))
        self.q_rows = pairs.q_rows[tile]  # [n, tile_q]
        self.kv_rows = pairs.kv_rows[pairs.kv_block % len(pairs.kv_rows)]
        self.lengths = pairs.q_positions.size, pairs.is_attended.shape[0]

    def allowed(self, allowed):
        """`allowed`, bool [n, batch or 1, tile_q, block_size], by segments and mask."""
        if "q_segments" in self.inputs:
            q_ids = self._of_queries(self.inputs["q_segments"][:, None])[..., None]
            kv_ids = self._of_keys(self.inputs["kv_segments"][:, None])[:, :, None]
            allowed &= tf.equal(q_ids, kv_ids) & (q_ids >= 0)
        if "mask" in self.inputs:
            shape = [1, self.heads, *self.lengths]
            mask = tf.pad(
                self.inputs["mask"] & np.ones(shape, bool), [[0, 0]] * 2 + [[0, 1]] * 2
            )
            where = np.broadcast_arrays(
                self.head[:, None, None], self.q_rows[..., None], self.kv_rows[:, None]
            )
            mask = tf.gather_nd(
                tf.transpose(mask, [1, 2, 3, 0]), np.stack(where, axis=-1)
            )
            allowed &= tf.transpose(mask, [0, 3, 1, 2])
        return allowed

    def scores(self, s):
        """Scores under the soft cap and the biases."""
        apart = self.q_rows[..., None] + self.rule.q_offset - self.kv_rows[:, None]
        head = self.head[:, None, None, None]
        return scores(self.rule, s, head, apart[:, None], self.heads)

    def drop(self, p):
        """Weights after dropout: `plan.dropout.kept_weights` in 64-bit integers."""
        rate = self.rule.dropout_rate
        if not rate:
            return p
        seed = tf.reshape(self.inputs["dropout_seed"], [2, 1, 1, 1])
        q_len, kv_len = self.lengths
        batch = tf.range(tf.cast(self.batch, tf.int64))[:, None, None]
        counter = _low(seed[1]), _high(seed[1]), batch, np.arange(self.heads)[:, None]
        c0, c1, s0, s1 = _philox(counter, (_low(seed[0]), _high(seed[0])))
        i, j = np.arange(q_len) + self.rule.q_offset, np.arange(kv_len)
        multiplier, addend, _, _ = _philox((i & _MASK, 0, c0, c1), (s0, s1))
        bits = self._of_queries(tf.bitwise.bitwise_or(multiplier, 1))[..., None]
        bits *= self._of_keys(_philox((j, 1, c0, c1), (s0, s1))[0])[:, :, None]
        bits = _low(bits + self._of_queries(addend)[..., None])
        kept = tf.cast(bits >= int(threshold(rate)), p.dtype)
        return p * kept * (1 / (1 - rate))

    def _of_queries(self, x):
        """A "by head" tensor of queries as [n, batch or 1, tile_q]."""
        return self._gather(x, self.q_rows)

    def _of_keys(self, x):
        """A "by head" tensor of keys as [n, batch or 1, block_size]."""
        return self._gather(x, self.kv_rows)

    def _gather(self, x, rows):
        # The row past the last is that of positions without one.
        x = tf.transpose(tf.pad(x, [[0, 0], [0, 0], [0, 1]]), [1, 2, 0])
        head = self.head if x.shape.as_list()[0] != 1 else np.zeros_like(self.head)
        head = np.broadcast_to(head[:, None], rows.shape)
        return tf.transpose(tf.gather_nd(x, np.stack([head, rows], axis=-1)), [0, 2, 1])


def _low(x):
    return tf.bitwise.bitwise_and(x, tf.constant(_MASK, tf.int64))


def _high(x):  # the shift keeps the sign, so its bits are taken off
    return _low(tf.bitwise.right_shift(x, tf.constant(32, tf.int64)))


def _philox(counter, key):
    """`plan.dropout.philox` of int64 tensors and arrays."""
    w0, w1, w2, w3 = (tf.cast(w, tf.int64) for w in counter)
    key0, key1 = key
    for _ in range(10):
        first, second = w0 * 0xD2511F53, w2 * 0xCD9E8D57
        w0, w1 = _xor(_high(second), w1, key0), _low(second)
        w2, w3 = _xor(_high(first), w3, key1), _low(first)
        key0, key1 = _low(key0 + 0x9E3779B9), _low(key1 + 0xBB67AE85)
    return w0, w1, w2, w3


def _xor(a, b, c):
    return tf.bitwise.bitwise_xor(tf.bitwise.bitwise_xor(a, b), c)
