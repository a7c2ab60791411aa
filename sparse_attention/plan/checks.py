"""Checks of what users pass, with errors that name the argument and its value."""

import numbers
from typing import Any


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


def _is_integer(size: Any) -> bool:
    return isinstance(size, numbers.Integral) and not isinstance(size, bool)
