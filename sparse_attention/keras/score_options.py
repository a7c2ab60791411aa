"""What stands between q kT and the softmax in a layer: options of the layer and model."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ops.positions import ROTARY_BASE, alibi_slopes
from ..plan.checks import as_ints, check_positive, is_number

# Each option, and its value where there is nothing of the kind.
SCORE_OPTIONS = {
    "alibi": False,
    "logit_softcap": None,
    "sinks": False,
    "relative_positions": None,
    "rotary": False,
}


def score_options(
    heads: int,
    alibi: Any,
    logit_softcap: float | None,
    sinks: bool,
    relative_positions: int | None,
    rotary: bool | float,
) -> dict:
    """The options, checked, as Python's own numbers, which can be saved as JSON.

    Raises:
      TypeError: If one is of another kind than `SparseSelfAttention` says.
      ValueError: If one is out of range, or there is not one slope for each head.
    """
    if logit_softcap is not None:
        logit_softcap = _positive("logit_softcap", logit_softcap, "a number or None")
    relative_positions = as_ints(relative_positions=relative_positions)[
        "relative_positions"
    ]
    if relative_positions is not None:
        check_positive(relative_positions=relative_positions)
    if not _is_bool(sinks):
        raise TypeError(f"sinks must be True or False, got {sinks!r}")
    if _is_bool(rotary):
        rotary = bool(rotary)
    else:
        rotary = _positive("rotary", rotary, "True, False or the base, a number")
    return {
        "alibi": bool(alibi) if _is_bool(alibi) else _slopes(alibi, heads),
        "logit_softcap": logit_softcap,
        "sinks": bool(sinks),
        "relative_positions": relative_positions,
        "rotary": rotary,
    }


def slopes_of(alibi: Any, heads: int) -> np.ndarray:
    """float32 [heads]: what an option `alibi` that is not False stands for."""
    return alibi_slopes(heads) if alibi is True else np.float32(alibi)


def base_of(rotary: bool | float) -> float:
    """What an option `rotary` that is not False stands for."""
    return ROTARY_BASE if rotary is True else rotary


def rate(name: str, x: Any) -> float:
    """`x` as a float in [0, 1), the fraction that is dropped."""
    if not is_number(x):
        raise TypeError(f"{name} must be a number, got {x!r}")
    if not 0 <= x < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {x}")
    return float(x)


def _slopes(alibi, heads):
    try:
        slopes = np.asarray(alibi, np.float64)
    except (TypeError, ValueError):
        slopes = np.array(np.nan)
    if slopes.shape != (heads,) or not np.isfinite(slopes).all():
        raise ValueError(
            f"alibi must be True, False or a finite slope for each of heads={heads}, "
            f"got {alibi!r}"
        )
    return slopes.tolist()


def _positive(name, x, expected):
    if not is_number(x):
        raise TypeError(f"{name} must be {expected}, got {x!r}")
    if not 0 < x < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {x}")
    return float(x)


def _is_bool(x):
    return isinstance(x, (bool, np.bool_))
