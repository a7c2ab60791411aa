"""Checks of what users pass, with errors that name the argument and its value."""

import numbers
from typing import Any

import numpy as np


def as_ints(**sizes: Any) -> dict:
    """The same sizes as Python's ints, NumPy's integers among them; None stays None.

    What is normalised once, where a user passes it, can be hashed and saved as JSON.

    >>> import numpy as np
    >>> as_ints(heads=np.int64(8), local_attn_ctx=None)
    {'heads': 8, 'local_attn_ctx': None}

    Raises:
      ValueError: If a size is neither an integer nor None.
    """
    for name, size in sizes.items():
        if size is not None and not _is_integer(size):
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    return {n: size if size is None else int(size) for n, size in sizes.items()}


def check_positive(**sizes: Any) -> None:
    """Raises ValueError unless every named size is a positive integer.

    >>> check_positive(window=0)
    Traceback (most recent call last):
    ValueError: window must be a positive integer, got 0
    """
    for name, size in sizes.items():
        if not _is_integer(size) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def check_not_negative(**sizes: Any) -> None:
    """Raises ValueError unless every named size is 0 or a positive integer.

    >>> check_not_negative(left=-1)
    Traceback (most recent call last):
    ValueError: left must be 0 or a positive integer, got -1
    """
    for name, size in sizes.items():
        if not _is_integer(size) or size < 0:
            raise ValueError(f"{name} must be 0 or a positive integer, got {size!r}")


def check_integer(**values: Any) -> None:
    """Raises ValueError unless every named value is an integer.

    >>> check_integer(offset=0.5)
    Traceback (most recent call last):
    ValueError: offset must be an integer, got 0.5
    """
    for name, value in values.items():
        if not _is_integer(value):
            raise ValueError(f"{name} must be an integer, got {value!r}")


def as_list(name: str, values: Any) -> list:
    """What a user passes as a list, a tuple or an array.

    >>> as_list("lengths", 512)
    Traceback (most recent call last):
    ValueError: lengths must be a list of integers, got 512

    Raises:
      ValueError: If it is none of these.
    """
    try:
        if not isinstance(values, str):
            return list(values)
    except TypeError:
        pass
    raise ValueError(f"{name} must be a list of integers, got {values!r}")


def as_positions(name: str, values: Any) -> np.ndarray:
    """Different positions, in any order, as an increasing array.

    >>> as_positions("positions", [7, 2])
    array([2, 7])

    Raises:
      ValueError: If they are no different integers from 0 on. A mask of zeros and ones,
        which other libraries take for this, has repetitions.
    """
    array = np.asarray(values)
    array = array.astype(int) if array.shape == (0,) else array
    if array.dtype.kind not in "iu" or array.ndim != 1 or (array < 0).any():
        raise ValueError(
            f"{name} must be a list of integers from 0 on, got {values!r}"
            + ("; np.flatnonzero gives them" if array.dtype.kind == "b" else "")
        )
    different = np.unique(array)
    if len(different) < len(array):
        raise ValueError(
            f"{name} must name a position once, got {values!r}; of a mask of zeros and "
            "ones np.flatnonzero gives the positions"
        )
    return different.astype(np.int64)


def _is_integer(size: Any) -> bool:
    return isinstance(size, numbers.Integral) and not isinstance(size, bool)


def is_number(x: Any) -> bool:
    """Whether `x` is a real number of Python or NumPy, and not a truth."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def as_truth(name: str, values: Any) -> np.ndarray:
    """The same values as booleans: integers are True unless they are 0.

    Floats must be 0 or 1. What a model adds to scores, 0 where a query attends and -inf
    where it does not, would come to mean the opposite.

    >>> as_truth("mask", [0.0, -np.inf])
    Traceback (most recent call last):
    TypeError: mask must be True or False, where True = attend, got float64 with the value -inf

    Raises:
      TypeError: If a value is no truth.
    """
    array = np.asarray(values)
    if array.dtype.kind in "biu":
        return array.astype(bool, copy=False)
    if array.dtype.kind != "f":
        raise TypeError(f"{name} must be bool, got {array.dtype}")
    others = array[(array != 0) & (array != 1)]
    if others.size:
        raise TypeError(
            f"{name} must be True or False, where True = attend, got {array.dtype} with "
            f"the value {others.flat[0]}"
        )
    return array.astype(bool)
