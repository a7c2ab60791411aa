"""What a function can reach: the tensors and the state that no caller sees it read.

TensorFlow does not say which tensors and variables an eager function reads. They are looked
for in its arguments, in what it closes over and in the globals that it names: in containers
of any depth, and in the attributes of objects, which may hold further objects.
"""

from __future__ import annotations

import collections
import functools
import inspect
import sys
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

# So many objects and functions may lie one in another.
DEPTH = 3
_CONTAINERS = (list, tuple, set, frozenset, collections.deque)
_OPAQUE = (str, bytes, type, types.ModuleType, tf.Variable, tf.Graph)


def tensors_among(found: list) -> list:
    """The tensors among what is reachable."""
    return [x for x in found if isinstance(x, tf.Tensor)]


def keras_state_among(found: list) -> list:
    """Keras 3's variables among what is reachable that are not trained.

    These are moving averages, and the seeds of what is random.
    """
    keras = keras_3()
    if keras is None:
        return []
    variables = []
    for x in found:
        if isinstance(x, keras.layers.Layer):
            variables += x.variables
        elif isinstance(x, keras.random.SeedGenerator):
            variables.append(x.state)
        elif isinstance(x, keras.Variable):
            variables.append(x)
    return list({id(v): v for v in variables if not v.trainable}.values())


def keras_3() -> Any:
    """Keras 3, if it is loaded and runs on TensorFlow; otherwise None."""
    keras = sys.modules.get("keras")
    if keras is None or not hasattr(keras, "StatelessScope"):
        return None
    return keras if keras.backend.backend() == "tensorflow" else None


def reachable(values: Any) -> list:
    """All that is reachable from a value, each once, what is nearest first."""
    found: dict = {}
    queue = collections.deque([(values, DEPTH)])
    while queue:
        x, depth = queue.popleft()
        if id(x) in found:
            continue
        found[id(x)] = x
        if isinstance(x, (tf.Tensor, *_OPAQUE)):
            continue
        if isinstance(x, Mapping):
            inner = list(x.values())
        elif isinstance(x, _CONTAINERS):
            inner = list(x)
        elif isinstance(x, np.ndarray):
            inner = list(x.flat) if x.dtype == object else []
        else:
            inner, depth = _contents(x) if depth else [], depth - 1
        queue.extend((y, depth) for y in inner)
    return list(found.values())


def _contents(x):
    """What a function reads, or an object holds."""
    if inspect.ismethod(x):
        return [x.__func__, x.__self__]
    if isinstance(x, functools.partial):
        return [x.func, x.args, x.keywords]
    contents = list(vars(x).values()) if hasattr(x, "__dict__") else []
    if inspect.isfunction(x):
        names = x.__code__.co_names
        contents += [x.__globals__[name] for name in names if name in x.__globals__]
        contents += [x.__defaults__ or (), x.__kwdefaults__ or {}]
        for cell in x.__closure__ or ():
            try:
                contents.append(cell.cell_contents)
            except ValueError:  # it has not been assigned yet
                pass
    for name in getattr(type(x), "__slots__", ()):
        if isinstance(name, str) and hasattr(x, name):
            contents.append(getattr(x, name))
    return contents
