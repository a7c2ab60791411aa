"""Recomputation: a second forward pass instead of the memory of its activations.

    @recomputable('block')  # or bare: @recomputable
    def block(x, w, activation):
        return tf.matmul(activation(x), w)

    y = block(x, w, tf.nn.relu, recompute=True)

With `recompute=True` nothing that `block` computes on the way is kept for the backward
pass: there it runs again, once the gradient of its result has arrived.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
import warnings
from typing import Callable

import tensorflow as tf

from .reachable import keras_3, keras_state_among, reachable, tensors_among

# TensorFlow 1's variables that are not resources: no op of its own reads them.
REF_VARIABLE_OPS = ("Variable", "VariableV2")


def recomputable(name: str | Callable) -> Callable:
    """Lets the caller of a function choose to recompute it in the backward pass.

    Used as `@recomputable('name')`, where the name labels the recomputed ops, or bare
    as `@recomputable`. The decorated function takes one more keyword, `recompute`,
    False by default. Everything else is handed on, tensors or not, by position or by
    keyword, nested or not, `self` included; results may be nested as well.

    Gradients reach the tensors among the arguments, the variables that the function
    reads and the other tensors that it captures; in graphs and in `tf.function` also
    the variables that it makes. In eager mode captured tensors are looked for in what
    the function closes over and in the attributes of its arguments, three objects deep.
    Results may be nested in what `tf.nest` opens, ragged and sparse tensors included.

    The function runs twice. What Keras 3's layers change on the way (the seeds of
    Dropout, the moving averages of BatchNormalization) changes once: the second time
    they begin with what they had, and what they change is dropped. All else must come
    out the same both times by itself: random numbers by stateless ops, or in a graph by
    ops with a seed of their own. Where they do not, the gradient raises ValueError; a
    graph in which a variable is updated twice gives a warning.

    Args:
      name: Label of the recomputed ops, or the function itself.

    Returns:
      A decorator, or the decorated function.

    Raises:
      TypeError: In eager mode, if a result holds tensors in what `tf.nest` does not open.
      ValueError: If the second run draws other random numbers, or if the function changes
        the state of a Keras layer that was not found in its arguments, its closure or the
        globals that it names.

    Numerics: As deterministic as the function. Sums over the ways by which a gradient
      reaches a tensor may be taken in another order than with `recompute=False`.
    Cost: One more forward pass, and the memory of one call at a time. TensorFlow 1's
      eager mode keeps the activations all the same.

    Reference: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost",
      arXiv:1604.06174.
    """
    if callable(name):
        return _decorate(name, getattr(name, "__name__", "function"))
    return lambda function: _decorate(function, name)


def _decorate(function, name):
    # What a scope may be called; that of "<lambda>" is "lambda".
    scope = re.sub(r"^[^A-Za-z0-9.]+|[^A-Za-z0-9_./-]", "", name) or "function"

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if kwargs.pop("recompute", False):
            return _call(function, scope, args, kwargs)
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    has_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters)
    recompute = inspect.Parameter(
        "recompute", inspect.Parameter.KEYWORD_ONLY, default=False
    )
    parameters.insert(len(parameters) - has_kwargs, recompute)
    signature = signature.replace(parameters=parameters)
    wrapper.__signature__ = signature  # type: ignore[attr-defined]
    return wrapper


def _call(function, name, args, kwargs):
    leaves = _flatten((args, kwargs))
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, tf.Tensor)]
    inputs = [leaves[i] for i in slots]

    def call(tensors):
        filled = dict(zip(slots, tensors))
        call_args, call_kwargs = _pack(
            (args, kwargs), [filled.get(i, leaf) for i, leaf in enumerate(leaves)]
        )
        return function(*call_args, **call_kwargs)

    held = reachable((function, args, kwargs))
    replay = _Replay((function, args, kwargs), held)
    result, captured, random_ops = _forward(call, inputs, held)
    flat = _flatten(result)
    if tf.executing_eagerly():
        _check_results(name, flat, held)
    out_slots = [i for i, leaf in enumerate(flat) if isinstance(leaf, tf.Tensor)]
    outputs = [flat[i] for i in out_slots]
    is_eager = tf.executing_eagerly()
    variable_scope = None if is_eager else tf.compat.v1.get_variable_scope()

    def grad(*d_outputs):
        given = {
            i: tf.convert_to_tensor(d)
            for i, d in zip(out_slots, d_outputs)
            if d is not None and _is_differentiable(d)
        }
        grads = [None] * len(inputs + captured)
        if given:
            with contextlib.ExitStack() as stack:
                _enter_scope(stack, name, outputs, variable_scope)
                again = _after(list(given.values()), inputs, stack)
                stack.enter_context(replay.scope())
                first = (outputs, random_ops)
                grads = _vjp(call, again, captured, given, out_slots, first)
        # Nothing flows to `outputs`: that way leads through the first forward pass.
        return [None] * len(outputs) + grads

    # An identity with a gradient of its own. It is given the results, so that it holds
    # no variables: custom_gradient would look for them, and only finds some kinds.
    @tf.custom_gradient
    def switch(*tensors):
        return [tf.identity(x) for x in tensors[: len(outputs)]], grad

    switched = switch(*outputs, *inputs, *[tf.identity(x) for x in captured])
    filled = dict(zip(out_slots, switched))
    return _pack(result, [filled.get(i, leaf) for i, leaf in enumerate(flat)])


def _flatten(structure):
    return tf.nest.flatten(structure, expand_composites=True)


def _pack(structure, flat):
    return tf.nest.pack_sequence_as(structure, flat, expand_composites=True)


def _check_results(name, flat, held):
    """Raises TypeError if new tensors hide among results, as they get no gradient."""
    known = None
    for leaf in flat:
        if isinstance(leaf, tf.Tensor):
            continue
        hidden = filter(_is_differentiable, tensors_among(reachable(leaf)))
        known = set(map(id, held)) if known is None else known
        if any(id(x) not in known for x in hidden):
            raise TypeError(
                f"{name} must return tensors in what tf.nest opens (tuples, lists, dicts), "
                f"got some in a {type(leaf).__name__}; with recompute=True they would get "
                "no gradient"
            )


def _enter_scope(stack, name, outputs, variable_scope):
    """Goes back to where the function was called, as far as a graph cares."""
    if variable_scope is not None:
        stack.enter_context(tf.device(outputs[0].device))
        stack.enter_context(tf.compat.v1.variable_scope(variable_scope, reuse=True))
    stack.enter_context(tf.name_scope(name + "_recompute"))


def _after(gradients, inputs, stack):
    """Copies of `inputs` that, in a graph, cannot be had before the gradients.

    Otherwise the graph may run the second forward pass at once and keep its activations
    until they are needed, or see that it equals the first and merge the two.
    """
    if tf.executing_eagerly():
        return [tf.identity(x) for x in inputs]
    stack.enter_context(tf.control_dependencies(gradients))
    # XLA ignores control edges. It has no way to know that this is 0, and x - 0 is x,
    # bit for bit.
    first = tf.math.real(tf.reshape(gradients[0], [-1])[:1])
    zero = tf.reduce_any(tf.logical_and(first > 1, first < 0))
    return [
        x - tf.cast(zero, x.dtype) if _is_differentiable(x) else tf.identity(x)
        for x in inputs
    ]


def _forward(call, inputs, held):
    """The result of `call(inputs)`, what it read besides, and its random ops.

    It reads variables and tensors. In eager mode the tensors are those among `held`.
    """
    if tf.executing_eagerly():
        with _unrecorded() as watcher:
            result = call(inputs)
        known = set(map(id, inputs))
        captured = [x for x in tensors_among(held) if id(x) not in known]
        captured = [x for x in captured if _is_differentiable(x)]
        return result, list(watcher.watched_variables()) + captured, []
    first_op = len(tf.compat.v1.get_default_graph().get_operations())
    with tf.GradientTape() as watcher:
        result = call(inputs)
    captured = list(watcher.watched_variables()) + _captured_tensors(first_op, inputs)
    return result, captured, _random_ops(first_op)


@contextlib.contextmanager
def _unrecorded():
    """Hides eager ops from all tapes, which would keep them; yet watches variables."""
    private = _recording()
    if private is None:
        with tf.GradientTape() as watcher:
            yield watcher
    else:
        with private.stop_recording(), private.VariableWatcher() as watcher:
            yield watcher


@functools.lru_cache(maxsize=None)
def _recording():
    """TensorFlow's private module that stops tapes from recording; None: there is none.

    TensorFlow 2.12 has it under the second name. That of TensorFlow 1 sees no variables
    while it does not record.
    """
    for name in ("record", "tape"):
        try:
            module = importlib.import_module(f"tensorflow.python.eager.{name}")
        except ImportError:
            continue
        if hasattr(module, "stop_recording") and hasattr(module, "VariableWatcher"):
            return module
    if not tf.__version__.startswith("1."):
        warnings.warn(
            f"recompute=True saves no memory in eager mode: TensorFlow {tf.__version__} "
            "has no tensorflow.python.eager.record as this version of "
            "sparse_attention knows it; in graphs and in tf.function it does",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def _captured_tensors(first_op, inputs):
    """Differentiable tensors that the ops from number `first_op` on read from others."""
    graph = tf.compat.v1.get_default_graph()
    outside = {id(inner): outer for outer, inner in getattr(graph, "captures", ())}
    new_ops = graph.get_operations()[first_op:]
    known = {id(tensor) for tensor in inputs}
    for op in new_ops:
        if op.type not in REF_VARIABLE_OPS:
            known.update(map(id, op.outputs))
    captured = {}
    for op in new_ops:
        for tensor in op.inputs:
            if id(tensor) in outside:
                tensor = outside[id(tensor)]
            elif id(tensor) in known:
                continue
            if _is_differentiable(tensor):
                captured[id(tensor)] = tensor
    return list(captured.values())


def _vjp(call, inputs, captured, given, out_slots, first):
    """Gradients of all inputs; `given` maps i to the gradient of `call(inputs)[i]`.

    `first` has the outputs and the random ops of the first run, which are compared.
    """
    sources = inputs + captured
    graph = tf.compat.v1.get_default_graph()
    d_outputs = list(given.values())
    if tf.executing_eagerly():
        grads, outputs = _tape_gradients(call, inputs, sources, given, d_outputs)
        _check_same(first[0], [outputs[i] for i in out_slots])
        return grads
    first_op = len(graph.get_operations())
    if graph.building_function:
        grads, _ = _tape_gradients(call, inputs, sources, given, d_outputs)
    else:
        outputs = _flatten(call(inputs))
        tensors = [x for x in sources if isinstance(x, tf.Tensor)]
        ys = [outputs[i] for i in given]
        grads = tf.gradients(ys, sources, d_outputs, stop_gradients=tensors)
    _check_ops(first[1], first_op)
    # Nothing else keeps an update of a variable from overtaking this second look at it.
    reads = [
        op
        for op in graph.get_operations()[first_op:]
        if any(_is_variable_handle(tensor) for tensor in op.inputs)
        and not any(tensor.dtype == tf.resource for tensor in op.outputs)
    ]
    with tf.control_dependencies(reads):
        return [None if grad is None else _identity(grad) for grad in grads]


def _tape_gradients(call, inputs, sources, given, d_outputs):
    with tf.GradientTape() as tape:
        tape.watch(sources)
        outputs = _flatten(call(inputs))
    return tape.gradient([outputs[i] for i in given], sources, d_outputs), outputs


# ---- what runs twice ----


class _Replay:
    """Gives Keras 3's variables what they had in the first run, and drops their changes."""

    def __init__(self, values, held):
        self._values = values
        self._before = [(v, tf.identity(v.value)) for v in keras_state_among(held)]
        self._known = {id(v) for v, _ in self._before}

    def knows(self, variable):
        """Also what the first run has made itself, such as a layer's variables."""
        if id(variable) not in self._known:
            found = keras_state_among(reachable(self._values))
            self._known.update(map(id, found))
        return id(variable) in self._known

    def scope(self):
        """The context of the second run."""
        keras = keras_3()
        if keras is None:
            return contextlib.ExitStack()
        knows = self.knows

        class Scope(keras.StatelessScope):  # type: ignore[name-defined]
            def add_update(self, update):
                variable, _ = update
                if not knows(variable):
                    raise ValueError(
                        "recompute=True must find what changes while the function runs, "
                        f"to give it the same values again: {variable.path} is not in its "
                        "arguments, its closure or the globals that it names; pass the "
                        "layer or the SeedGenerator as an argument"
                    )
                super().add_update(update)

        return Scope(self._before)


def _random_ops(first_op):
    """The seeds of the random ops from number `first_op` on: {(type, seed, seed2): ops}."""
    found: dict = {}
    for op in tf.compat.v1.get_default_graph().get_operations()[first_op:]:
        if _has_seeds(op):
            key = (op.type, op.get_attr("seed"), op.get_attr("seed2"))
            found.setdefault(key, []).append(op.name)
    return found


_seeded_types: dict = {}


def _has_seeds(op):
    if op.type not in _seeded_types:
        attrs = {attr.name for attr in op.op_def.attr}
        _seeded_types[op.type] = {"seed", "seed2"} <= attrs
    return _seeded_types[op.type]


def _check_ops(first_random_ops, first_op):
    """Raises or warns where the ops from number `first_op` on do not repeat the first."""
    for key, names in _random_ops(first_op).items():
        if key[1:] == (0, 0) or key not in first_random_ops:
            raise ValueError(
                f"{names[0]} ({key[0]}) draws other random numbers in the recomputation: "
                "give it a seed of its own, or use tf.random.stateless_... or a Keras 3 "
                "layer"
            )
    for op in tf.compat.v1.get_default_graph().get_operations()[first_op:]:
        if op.type.startswith(("Assign", "ResourceScatter")):
            warnings.warn(
                f"recompute=True runs {op.name} ({op.type}) twice: the variable is updated "
                "in the forward pass and again in the recomputation",
                RuntimeWarning,
                stacklevel=2,
            )


def _check_same(first, again):
    """Raises ValueError where the results of two eager runs are not the same numbers.

    A sum in another order may change the last bits. Other random numbers change more.
    """
    for x, y in zip(first, again):
        if x.dtype.is_floating and tf.size(x) > 0:
            x, y = tf.cast(x, tf.float32), tf.cast(y, tf.float32)
            if tf.reduce_max(abs(x - y)) > tf.reduce_max(abs(x)) / 16:
                raise ValueError(
                    "the function gave other results in the recomputation: random numbers "
                    "must come out the same both times, by tf.random.stateless_... or a "
                    "Keras 3 layer"
                )


def _is_variable_handle(tensor):
    """Of a graph, or, captured, of a function."""
    kinds = ("VarHandleOp", "Placeholder")
    return tensor.dtype == tf.resource and tensor.op.type in kinds


def _identity(grad):
    if isinstance(grad, tf.IndexedSlices):
        values = tf.identity(grad.values)
        return tf.IndexedSlices(values, grad.indices, grad.dense_shape)
    return tf.identity(grad)


def _is_differentiable(tensor):
    return tensor.dtype.base_dtype.is_floating or tensor.dtype.base_dtype.is_complex
