"""What stands between q kT and the softmax besides the plan, as the op takes it."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from ..plan.checks import is_number


class ScoreRule(NamedTuple):
    """The rule of a call: attributes of the op, and its inputs by their names."""

    logit_softcap: float = 0.0  # 0: none
    dropout_rate: float = 0.0
    q_offset: int = 0
    inputs: dict = {}  # name in signature.RULE_INPUTS -> tensor, in their order

    def attributes(self):
        """dict: the attributes of the op that state the rule."""
        return {
            "logit_softcap": self.logit_softcap,
            "dropout_rate": self.dropout_rate,
            "q_offset": self.q_offset,
            "rule": list(self.inputs),
        }


NO_RULE = ScoreRule()


def score_rule(
    q: tf.Tensor,
    k: tf.Tensor,
    heads: int,
    segment_ids: Any = None,
    mask: Any = None,
    logit_softcap: float | None = None,
    alibi_slopes: Any = None,
    relative_bias: Any = None,
    dropout_rate: float = 0.0,
    dropout_seed: Any = None,
    q_offset: int = 0,
) -> ScoreRule:
    """The `ScoreRule` of arguments of `block_sparse_attention`, which says what they are.

    Raises:
      TypeError, ValueError: If one is not what it must be.
    """
    sizes = {
        "batch": q.shape[0],
        "heads": heads,
        "q_len": q.shape[1],
        "kv_len": k.shape[1],
    }
    sizes = {name: tf.compat.dimension_value(size) for name, size in sizes.items()}
    inputs = {}
    if alibi_slopes is not None:
        inputs["alibi_slopes"] = as_floats(
            "alibi_slopes", alibi_slopes, [heads], "[heads]"
        )
    if relative_bias is not None:
        bias = as_floats(
            "relative_bias", relative_bias, [None, None], "[heads or 1, 2 R - 1]"
        )
        rows, width = bias.shape.as_list()
        if rows not in (None, 1, heads) or (width is not None and width % 2 == 0):
            raise ValueError(
                f"relative_bias must have shape [heads={heads} or 1, 2 R - 1], got {bias.shape}"
            )
        inputs["relative_bias"] = bias
    if segment_ids is not None:
        for name, ids in zip(("q", "kv"), _pair_of_segments(segment_ids, sizes)):
            shape = [sizes["batch"], sizes[name + "_len"]]
            ids = _as_integers(f"segment_ids of {name}", ids, tf.int32)
            _check_shape(f"segment_ids of {name}", ids, shape, f"[batch, {name}_len]")
            inputs[name + "_segments"] = ids
    if mask is not None:
        inputs["mask"] = _as_mask(mask, sizes)
    dropout_rate = _number("dropout_rate", dropout_rate)
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate}")
    if dropout_rate > 0:
        if dropout_seed is None:
            raise ValueError(
                f"dropout_seed must be given with dropout_rate={dropout_rate}: two integers, "
                "others for each call, say of keras.random.SeedGenerator().next()"
            )
        seed = _as_integers("dropout_seed", dropout_seed, tf.int64)
        _check_shape("dropout_seed", seed, [2], "[2]")
        inputs["dropout_seed"] = seed
    if logit_softcap is not None:
        logit_softcap = _number("logit_softcap", logit_softcap)
        if not 0 < logit_softcap < float("inf"):
            raise ValueError(
                f"logit_softcap must be positive and finite, or None, got {logit_softcap}"
            )
    if isinstance(q_offset, bool) or not isinstance(q_offset, numbers.Integral):
        raise TypeError(f"q_offset must be an integer, got {q_offset!r}")
    if not -(2**31) < q_offset < 2**31:
        raise ValueError(f"q_offset must be in (-2^31, 2^31), got {q_offset}")
    return ScoreRule(logit_softcap or 0.0, dropout_rate, int(q_offset), inputs)


def as_floats(name: str, x: Any, shape: list | None, expected: str) -> tf.Tensor:
    """`x` as a float32 tensor of a shape, which `expected` names."""
    x = tf.convert_to_tensor(x, name=name)
    if not x.dtype.is_floating:
        raise TypeError(f"{name} must be floating point, got {x.dtype.name}")
    _check_shape(name, x, shape, expected)
    return tf.cast(x, tf.float32)


def _number(name, x):
    if not is_number(x):
        raise TypeError(f"{name} must be a number, got {x!r}")
    return float(x)


def _as_integers(name, x, dtype):
    if not tf.is_tensor(x):
        array = np.asarray(x)
        if array.dtype.kind in "iu":
            x = array.astype(dtype.as_numpy_dtype)
    x = tf.convert_to_tensor(x)
    if not x.dtype.is_integer:
        raise TypeError(f"{name} must be integers, got {x.dtype.name}")
    return tf.cast(x, dtype)


def _check_shape(name, x, shape, expected):
    if not x.shape.is_compatible_with(shape):
        raise ValueError(f"{name} must have shape {expected} = {shape}, got {x.shape}")


def _pair_of_segments(segment_ids, sizes):
    if isinstance(segment_ids, (tuple, list)) and len(segment_ids) == 2:
        if all(_rank(ids) == 2 for ids in segment_ids):
            return segment_ids
    if sizes["q_len"] != sizes["kv_len"]:
        raise ValueError(
            "segment_ids must be a pair, for q and for kv, where their lengths differ: "
            f"q_len={sizes['q_len']}, kv_len={sizes['kv_len']}"
        )
    return segment_ids, segment_ids


def _rank(x):
    return x.shape.rank if tf.is_tensor(x) else np.ndim(x)


def _as_mask(mask, sizes):
    """bool [batch or 1, heads or 1, q_len or 1, kv_len or 1]."""
    mask = tf.convert_to_tensor(mask, name="mask")
    if mask.dtype != tf.bool:
        raise TypeError(
            f"mask must be bool, True = attend, got {mask.dtype.name}; tf.cast(mask, tf.bool) "
            "makes it so"
        )
    shape = list(sizes.values())
    rank = mask.shape.rank
    if rank is None or rank > 4:
        raise ValueError(f"mask must have rank 4 or less, got shape {mask.shape}")
    for _ in range(4 - rank):
        mask = mask[None]
    for size, expected in zip(mask.shape.as_list(), shape):
        if None not in (size, expected) and size not in (1, expected):
            raise ValueError(
                f"mask must broadcast to [batch, heads, q_len, kv_len] = {shape}, got "
                f"{mask.shape}"
            )
    return mask
