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


@np.errstate(divide="ignore", invalid="ignore")  # log(0); whatever masked keys hold
def attention_fwd(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    softmax_scale: float | None = None,
    kv_lengths: Any = None,
) -> tuple:
    """Each query's average of the values, weighted by how well it matches their keys.

        s_ij = softmax_scale * <q_i, k_j>      lse_i = log sum_j exp(s_ij)
        o_i  = sum_j exp(s_ij - lse_i) * v_j   (sums over the allowed j only)

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
      mask: bool, broadcasts to [heads, q_len, kv_len], True = attend; None: all.
      softmax_scale: Multiplies the scores; None: 1 / sqrt(head_dim).
      kv_lengths: int [batch]; keys at or past it do not exist. None: all do.

    Returns:
      o: float64 [batch, q_len, heads, head_dim_v].
      lse: float64 [batch, heads, q_len], nats.

    Raises:
      TypeError: If the mask is neither boolean nor integer, nor floats that are 0 or 1.
      ValueError: If shapes do not fit.
    """
    q, k, v, allowed, scale, group = _prepare(q, k, v, mask, softmax_scale, kv_lengths)
    batch, q_len, heads, _ = q.shape
    o = np.zeros((batch, q_len, heads, v.shape[3]))
    lse = np.zeros((batch, heads, q_len))
    for b, h in np.ndindex(batch, heads):
        keys, values = k[b, :, h // group], v[b, :, h // group]
        p, lse[b, h] = _softmax(q[b, :, h] @ keys.T * scale, allowed[b, h])
        o[b, :, h] = _matmul_allowed(p, values, allowed[b, h])
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
) -> tuple:
    """The gradients of `attention_fwd` by the chain rule.

        p_ij  = exp(s_ij - lse_i)         dp_ij   = <do_i, v_j>
        ds_ij = p_ij * (dp_ij - delta_i + dlse_i)
        delta_i = sum_j p_ij * dp_ij  (= <do_i, o_i>)
        dq_i  = softmax_scale * sum_j ds_ij * k_j
        dk_j  = softmax_scale * sum_i ds_ij * q_i
        dv_j  = sum_i p_ij * do_i

    Args:
      q, k, v, mask, softmax_scale, kv_lengths: As in `attention_fwd`.
      do: [batch, q_len, heads, head_dim_v], gradient of o.
      dlse: [batch, heads, q_len], gradient of lse; None: zero.

    Returns:
      dq, dk, dv: float64, shaped like q, k and v; a kv head sums over its heads.

    Raises:
      TypeError, ValueError: As `attention_fwd`.
    """
    q, k, v, allowed, scale, group = _prepare(q, k, v, mask, softmax_scale, kv_lengths)
    do = np.asarray(do, np.float64)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        queries, keys, values = q[b, :, h], k[b, :, h // group], v[b, :, h // group]
        may = allowed[b, h]
        p, _ = _softmax(queries @ keys.T * scale, may)
        dp = do[b, :, h] @ values.T
        delta = np.sum(np.where(may, p * dp, 0), axis=1)  # = <do, o>
        if dlse is not None:
            delta = delta - np.asarray(dlse, np.float64)[b, h]
        ds = np.where(may, p * (dp - delta[:, None]), 0)
        dq[b, :, h] = _matmul_allowed(ds, keys, may) * scale
        dk[b, :, h // group] += _matmul_allowed(ds.T, queries, may.T) * scale
        dv[b, :, h // group] += _matmul_allowed(p.T, do[b, :, h], may.T)
    return dq, dk, dv


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


def _softmax(s, allowed):
    """Weights and log-sum-exp of the allowed scores; zeros and -inf where none is."""
    s = np.where(allowed, s, -np.inf)
    row_max = s.max(axis=1, initial=-np.inf)
    row_max = np.where(np.isneginf(row_max), 0, row_max)
    p = np.exp(s - row_max[:, None])
    row_sum = p.sum(axis=1)
    lse = row_max + np.log(row_sum)
    return np.where(allowed, p / row_sum[:, None], 0), lse


def _matmul_allowed(w, x, allowed):
    """`w @ x` over the allowed pairs alone, even where x is NaN or Inf elsewhere."""
    is_finite = np.isfinite(x).all(axis=1)
    out = w @ np.where(is_finite[:, None], x, 0)
    for j in np.flatnonzero(~is_finite):
        out += np.where(allowed[:, j, None], w[:, j, None] * x[j], 0)
    return out
