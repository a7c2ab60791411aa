"""Checks of what users pass, with errors that name the argument and its value."""

import numbers


def check_positive(**sizes):
    """Raises ValueError unless every named size is a positive integer.

    >>> check_positive(window=0)
    Traceback (most recent call last):
    ValueError: window must be a positive integer, got 0
    """
    for name, size in sizes.items():
        is_integer = isinstance(size, numbers.Integral) and not isinstance(size, bool)
        if not is_integer or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
