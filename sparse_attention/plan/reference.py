"""The specification: attention and its gradients in float64, as plain as they come.

Nothing fast imports this file; every kernel is tested against it. It settles:

- A row that attends to nothing gives `o = 0`, `lse = -inf` and zero gradients.
- A masked key takes no part, whatever it holds: 0 * NaN does not reach a result.
- `lse` is the natural log of the sum of the exponentials of the scaled, masked scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .checks import as_truth
from .dropout import kept_weights


@np.errstate(divide="ignore", invalid="ignore")  # log(0); whatever masked keys hold
def attention_fwd(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    softmax_scale: float | None = None,
    kv_lengths: Any = None,
    **rule: Any,
) -> tuple:
    """Each query's average of the values, weighted by how well it matches their keys.

        s_ij = softmax_scale * <q_i, k_j>      lse_i = log sum_j exp(s_ij)
        o_i  = sum_j exp(s_ij - lse_i) * v_j   (sums over the allowed j only)

    `Rule` says what else may stand between <q_i, k_j> and the softmax.

    >>> q = k = v = np.eye(2)[None, :, None, :]  # batch 1, 2 positions, 1 head, dim 2
    >>> o, lse = attention_fwd(q, k, v, mask=np.array([[False, False], [True, True]]))
    >>> o[0, :, 0].round(2)
    array([[0.  , 0.  ],
           [0.33, 0.67]])
    >>> lse[0, 0].round(2)
    array([-inf, 1.11])

    Args:
      q: [batch, q_len, heads, head_dim], any float dtype.
      k: [batch, kv_len, kv_heads, head_dim]; head h reads kv head
        floor(h / (heads / kv_heads)).
      v: [batch, kv_len, kv_heads, head_dim_v].
      mask: bool, broadcasts to [batch, heads, q_len, kv_len], True = attend; None: all.
      softmax_scale: Multiplies the scores; None: 1 / sqrt(head_dim).
      kv_lengths: int [batch]; keys at or past it do not exist. None: all do.
      **rule: Arguments of `Rule`.

    Returns:
      o: float64 [batch, q_len, heads, head_dim_v].
      lse: float64 [batch, heads, q_len], nats.

    Raises:
      TypeError: If the mask is neither boolean nor integer, nor floats that are 0 or 1.
      ValueError: If shapes do not fit.
    """
    q, k, v, allowed, scale, group = _prepare(q, k, v, mask, softmax_scale, kv_lengths)
    given = Rule(allowed, **rule)
    batch, q_len, heads, _ = q.shape
    o = np.zeros((batch, q_len, heads, v.shape[3]))
    lse = np.zeros((batch, heads, q_len))
    for b, h in np.ndindex(batch, heads):
        keys, values = k[b, :, h // group], v[b, :, h // group]
        s, _ = given.scores(q[b, :, h] @ keys.T * scale, h)
        may = given.allowed[b, h]
        p, lse[b, h] = _softmax(s, may, given.sinks[h])
        o[b, :, h] = _matmul_allowed(p * given.kept[b, h], values, may)
    return o, lse


@np.errstate(divide="ignore", invalid="ignore")
def attention_bwd(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    do: Any,
    dlse: Any = None,
    softmax_scale: float | None = None,
    kv_lengths: Any = None,
    **rule: Any,
) -> tuple:
    """The gradients of `attention_fwd` by the chain rule.

        p_ij  = exp(s_ij - lse_i)         dp_ij   = <do_i, v_j>
        ds_ij = p_ij * (dp_ij - delta_i + dlse_i)
        delta_i = sum_j p_ij * dp_ij  (= <do_i, o_i>)
        dq_i  = softmax_scale * sum_j ds_ij * k_j
        dk_j  = softmax_scale * sum_i ds_ij * q_i
        dv_j  = sum_i p_ij * do_i

    Args:
      q, k, v, mask, softmax_scale, kv_lengths, rule: As in `attention_fwd`.
      do: [batch, q_len, heads, head_dim_v], gradient of o.
      dlse: [batch, heads, q_len], gradient of lse; None: zero.

    Returns:
      dq, dk, dv: float64, shaped like q, k and v; a kv head sums over its heads.
      drelative_bias, dsinks: float64, shaped like them, in this order, where they are
        given.

    Raises:
      TypeError, ValueError: As `attention_fwd`.
    """
    q, k, v, allowed, scale, group = _prepare(q, k, v, mask, softmax_scale, kv_lengths)
    given = Rule(allowed, **rule)
    do = np.asarray(do, np.float64)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dbias = None if given.bias is None else np.zeros_like(given.bias)
    dsinks = np.zeros(q.shape[2])
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        queries, keys, values = q[b, :, h], k[b, :, h // group], v[b, :, h // group]
        may, kept = given.allowed[b, h], given.kept[b, h]
        s, slope = given.scores(queries @ keys.T * scale, h)
        p, lse = _softmax(s, may, given.sinks[h])
        dp = do[b, :, h] @ values.T * kept
        delta = np.sum(np.where(may, p * dp, 0), axis=1)  # = <do, o>
        if dlse is not None:
            delta = delta - np.asarray(dlse, np.float64)[b, h]
        ds = np.where(may, p * (dp - delta[:, None]), 0)
        if dbias is not None:
            np.add.at(dbias[h % len(dbias)], given.bias_index, ds)
        dsinks[h] -= np.sum(
            np.where(np.isneginf(lse), 0, np.exp(given.sinks[h] - lse) * delta)
        )
        ds = ds * slope
        dq[b, :, h] = _matmul_allowed(ds, keys, may) * scale
        dk[b, :, h // group] += _matmul_allowed(ds.T, queries, may.T) * scale
        dv[b, :, h // group] += _matmul_allowed((p * kept).T, do[b, :, h], may.T)
    extra = [] if dbias is None else [dbias]
    return (dq, dk, dv, *extra, *([dsinks] if given.has_sinks else []))


class Rule:
    """What may stand between <q_i, k_j> and the softmax besides scale and mask.

        s_ij = logit_softcap * tanh(s_ij / logit_softcap)
        s_ij = s_ij - alibi_slopes[h] * |i - j|
        s_ij = s_ij + relative_bias[h, clip(i - j, 1 - R, R - 1) + R - 1]
        s_ij = -inf unless q_segments[i] = kv_segments[j] >= 0
        lse_i = log(exp(sinks[h]) + sum_j exp(s_ij))
        p_ij = exp(s_ij - lse_i), and in o either 0 or p_ij / (1 - dropout_rate)

    i is the row of the query plus q_offset, j the row of the key.

    Args:
      allowed: bool [batch, heads, q_len, kv_len], from which pairs of unequal segments
        are taken.
      logit_softcap: Above 0; None: no cap.
      alibi_slopes: [heads]; None: zeros.
      relative_bias: [heads or 1, 2 * R - 1]; None: zeros.
      segment_ids: A pair of int [batch, q_len] and [batch, kv_len]; None: all equal.
      sinks: [heads]; None: -inf.
      dropout_rate: In [0, 1); `dropout.kept_weights` says which weights it drops.
      dropout_seed: int64 [2].
      q_offset: int.
    """

    def __init__(
        self,
        allowed,
        logit_softcap=None,
        alibi_slopes=None,
        relative_bias=None,
        segment_ids=None,
        sinks=None,
        dropout_rate=0.0,
        dropout_seed=None,
        q_offset=0,
    ):
        batch, heads, q_len, kv_len = allowed.shape
        self.cap = logit_softcap
        distance = np.arange(q_len)[:, None] + q_offset - np.arange(kv_len)
        self.alibi = (
            np.zeros(heads) if alibi_slopes is None else np.asarray(alibi_slopes)
        )
        self.distance = np.abs(distance)
        self.bias = None
        if relative_bias is not None:
            self.bias = np.asarray(relative_bias, np.float64)
            reach = (self.bias.shape[1] + 1) // 2
            self.bias_index = np.clip(distance, 1 - reach, reach - 1) + reach - 1
        if segment_ids is not None:
            q_ids, kv_ids = (np.asarray(ids)[:, None] for ids in segment_ids)
            same = q_ids[..., None] == kv_ids[:, :, None]
            allowed = allowed & same & (q_ids[..., None] >= 0)
        self.allowed = allowed
        self.has_sinks = sinks is not None
        self.sinks = np.asarray(sinks if self.has_sinks else [-np.inf] * heads, float)
        self.kept = np.ones(allowed.shape)
        if dropout_rate:
            shape = batch, heads, q_len, kv_len
            kept = kept_weights(dropout_rate, dropout_seed, *shape, q_offset)
            self.kept = kept / (1 - dropout_rate)

    def scores(self, s, head):
        """The scores of a head under the rule, and their derivative by s."""
        slope = 1.0
        if self.cap is not None:
            s = np.tanh(s / self.cap)
            s, slope = self.cap * s, 1 - s**2
        s = s - self.alibi[head] * self.distance
        if self.bias is not None:
            s = s + self.bias[head % len(self.bias)][self.bias_index]
        return s, slope


def _prepare(q, k, v, mask, softmax_scale, kv_lengths):
    """Checks and widens the inputs of `attention_fwd`.

    Returns:
      q, k and v in float64; allowed, bool [batch, heads, q_len, kv_len]; the scale; and
      the number of query heads for each kv head.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    for name, x in ("q", q), ("k", k), ("v", v):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be [batch, len, heads, dim], got shape {x.shape}"
            )
    (batch, q_len, heads, head_dim), (_, kv_len, kv_heads, _) = q.shape, k.shape
    if k.shape[0] != batch or k.shape[3] != head_dim or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if heads % kv_heads:
        raise ValueError(
            f"heads must be a multiple of kv_heads={kv_heads}, got {heads}"
        )
    allowed = np.ones((batch, heads, q_len, kv_len), bool)
    if mask is not None:
        allowed &= as_truth("mask", mask)
    if kv_lengths is not None:
        allowed &= np.arange(kv_len) < np.reshape(kv_lengths, (batch, 1, 1, 1))
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    return q, k, v, allowed, scale, heads // kv_heads


def _softmax(s, allowed, sink):
    """Weights and log-sum-exp of the allowed scores; zeros and -inf where none is."""
    s = np.where(allowed, s, -np.inf)
    row_max = np.maximum(s.max(axis=1, initial=-np.inf), sink)
    row_max = np.where(np.isneginf(row_max), 0, row_max)
    p = np.exp(s - row_max[:, None])
    row_sum = p.sum(axis=1) + np.exp(sink - row_max)
    lse = row_max + np.log(row_sum)
    return np.where(allowed, p / row_sum[:, None], 0), lse


def _matmul_allowed(w, x, allowed):
    """`w @ x` over the allowed pairs alone, even where x is NaN or Inf elsewhere."""
    is_finite = np.isfinite(x).all(axis=1)
    out = w @ np.where(is_finite[:, None], x, 0)
    for j in np.flatnonzero(~is_finite):
        out += np.where(allowed[:, j, None], w[:, j, None] * x[j], 0)
    return out
