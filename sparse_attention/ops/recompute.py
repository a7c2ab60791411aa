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
import warnings
from typing import Callable

import tensorflow as tf

# TensorFlow 1's variables that are not resources: no op of its own reads them.
REF_VARIABLE_OPS = ("Variable", "VariableV2")


def recomputable(name: str | Callable) -> Callable:
    """Lets the caller of a function choose to recompute it in the backward pass.

    Used as `@recomputable('name')`, where the name labels the recomputed ops, or bare
    as `@recomputable`. The decorated function takes one more keyword, `recompute`,
    False by default. Everything else is handed on, tensors or not, by position or by
    keyword, nested or not, `self` included; results may be nested as well.

    Gradients reach the tensors among the arguments and the variables that the function
    reads; in graphs and in `tf.function` also the other tensors that it captures and
    the variables that it makes. In eager mode, pass such tensors as arguments.

    The function runs twice: so do its side effects, and random numbers must come out
    the same both times (stateless ops, or in a graph ops with a seed of their own).

    Args:
      name: Label of the recomputed ops, or the function itself.

    Returns:
      A decorator, or the decorated function.

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
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if kwargs.pop("recompute", False):
            return _call(function, name, args, kwargs)
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
    leaves = tf.nest.flatten((args, kwargs))
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, tf.Tensor)]
    inputs = [leaves[i] for i in slots]

    def call(tensors):
        filled = dict(zip(slots, tensors))
        call_args, call_kwargs = tf.nest.pack_sequence_as(
            (args, kwargs), [filled.get(i, leaf) for i, leaf in enumerate(leaves)]
        )
        return function(*call_args, **call_kwargs)

    result, captured = _forward(call, inputs)
    flat = tf.nest.flatten(result)
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
                grads = _vjp(call, again, captured, given)
        # Nothing flows to `outputs`: that way leads through the first forward pass.
        return [None] * len(outputs) + grads

    # An identity with a gradient of its own. It is given the results, so that it holds
    # no variables: custom_gradient would look for them, and only finds some kinds.
    @tf.custom_gradient
    def switch(*tensors):
        return [tf.identity(x) for x in tensors[: len(outputs)]], grad

    switched = switch(*outputs, *inputs, *[tf.identity(x) for x in captured])
    filled = dict(zip(out_slots, switched))
    return tf.nest.pack_sequence_as(
        result, [filled.get(i, leaf) for i, leaf in enumerate(flat)]
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


def _forward(call, inputs):
    """The result of `call(inputs)`, and what it read besides: variables and tensors."""
    if tf.executing_eagerly():
        with _unrecorded() as watcher:
            result = call(inputs)
        return result, list(watcher.watched_variables())
    first_op = len(tf.compat.v1.get_default_graph().get_operations())
    with tf.GradientTape() as watcher:
        result = call(inputs)
    captured = list(watcher.watched_variables()) + _captured_tensors(first_op, inputs)
    return result, captured


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


def _vjp(call, inputs, captured, given):
    """Gradients of all inputs; `given` maps i to the gradient of `call(inputs)[i]`."""
    sources = inputs + captured
    graph = tf.compat.v1.get_default_graph()
    d_outputs = list(given.values())
    if tf.executing_eagerly():
        return _tape_gradients(call, inputs, sources, given, d_outputs)
    first_op = len(graph.get_operations())
    if graph.building_function:
        grads = _tape_gradients(call, inputs, sources, given, d_outputs)
    else:
        outputs = tf.nest.flatten(call(inputs))
        tensors = [x for x in sources if isinstance(x, tf.Tensor)]
        ys = [outputs[i] for i in given]
        grads = tf.gradients(ys, sources, d_outputs, stop_gradients=tensors)
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
        outputs = tf.nest.flatten(call(inputs))
    return tape.gradient([outputs[i] for i in given], sources, d_outputs)


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
