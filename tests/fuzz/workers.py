"""Runs calls in forked workers, so that a crash or a hang is one more result.

A call may succeed or raise an error of TensorFlow's. All else is one of `FAILURES`:

  crash      A signal ended the process, SIGABRT after a failed CHECK among them.
  hang       The call took longer than its time limit.
  sanitizer  AddressSanitizer or UndefinedBehaviorSanitizer ended the process.
  memory     The call made more memory resident than its inputs can explain.
  differs    Other bytes in freed memory, or other numbers than before, came out; or the
             result has not the shape that the shape function tells.
  refused    A call without mutations raised an error.
  exception  Something else than an error of TensorFlow's was raised.
"""

import collections
import ctypes
import faulthandler
import itertools
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import tempfile
import threading
import time

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, tensor_shape_pb2
from tensorflow.python.eager import context, execute

from . import calls

FAILURES = ("crash", "hang", "sanitizer", "memory", "differs", "refused", "exception")
CALL_SECONDS = 20
CALLS_OF_A_WORKER = 250
MAPPED_BYTES = 3 << 30  # that a worker may map beyond what TensorFlow has at its start
RESIDENT_BYTES = 1 << 29  # that a call may add, whose inputs are a few MB
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")  # CPUs without one use their best
IS_SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")

# What a task came to: "success", "error" or one of `FAILURES`, and more about it.
Result = collections.namedtuple("Result", "kind detail")

# Something to do in a worker: a label, a function that returns a `Result`, its time limit.
Task = collections.namedtuple("Task", "label run seconds")


# ---- from calls to TensorFlow ----


def proto_of(x):
    """The TensorProto of a `calls.Array`, of any shape."""
    proto = tensor_pb2.TensorProto(dtype=enum_of(x.dtype))
    proto.tensor_shape.CopyFrom(shape_proto(x.shape))
    count = calls.elements(x.shape)
    if count:
        data = x.data if x.data.size else np.zeros(1, calls.np_dtype(x.dtype))
        proto.tensor_content = np.resize(data, count).tobytes()
    return proto


def shape_proto(shape):
    """The TensorShapeProto of a shape that `tf.TensorShape` may refuse; None: unknown."""
    proto = tensor_shape_pb2.TensorShapeProto(unknown_rank=shape is None)
    for size in shape or ():
        proto.dim.add(size=size)
    return proto


def enum_of(dtype):
    return tf.as_dtype(dtype).as_datatype_enum


def plain(value):
    return enum_of(value) if isinstance(value, tf.DType) else value


def prepare_eager(call):
    """A function that runs the op in eager mode, past Python's wrapper of it."""
    inputs = [
        tf.io.parse_tensor(proto_of(x).SerializeToString(), x.dtype)
        for x in call.inputs.values()
    ]
    attributes = [
        (name, tf.nest.map_structure(plain, value))
        for name, value in call.attributes.items()
    ]
    attributes = tuple(itertools.chain.from_iterable(attributes))

    def run():
        outputs = execute.execute(
            call.op, call.outputs, inputs, attributes, context.context()
        )
        return [tf.reshape(x, [-1]).numpy() for x in outputs]

    return run


def graph_of(call):
    """A GraphDef whose node "op" is the call, and {tensor: what to feed}.

    An input is a constant, whose shape and values the graph knows; or it is parsed when
    the graph runs. If the graph is imported only, inputs are placeholders, of which
    nothing has to be small.
    """
    graph, fed = tf.compat.v1.GraphDef(), {}
    op = graph.node.add(name="op", op=call.op, input=list(call.inputs))
    for name, value in call.attributes.items():
        if isinstance(value, tf.DType):
            op.attr[name].type = enum_of(value)
        elif isinstance(value, float):
            op.attr[name].f = value
        elif name == "rule_types" and isinstance(value, list):
            op.attr[name].list.type.extend(map(enum_of, value))
        elif isinstance(value, list):
            op.attr[name].list.s.extend(map(tf.compat.as_bytes, value))
        else:
            op.attr[name].i = value
    for name, x in call.inputs.items():
        if call.mode == "imported":
            node = graph.node.add(name=name, op="Placeholder")
            node.attr["dtype"].type = enum_of(x.dtype)
            shape = None if name in call.fed else x.shape
            node.attr["shape"].shape.CopyFrom(shape_proto(shape))
        elif name in call.fed:
            node = graph.node.add(name=name + "_bytes", op="Placeholder")
            node.attr["dtype"].type = enum_of(tf.string)
            node = graph.node.add(name=name, op="ParseTensor", input=[node.name])
            node.attr["out_type"].type = enum_of(x.dtype)
            fed[name + "_bytes:0"] = proto_of(x).SerializeToString()
        else:
            add_constant(graph, name, x)
    return graph, fed


def add_constant(graph, name, x):
    node = graph.node.add(name=name, op="Const")
    node.attr["dtype"].type = enum_of(x.dtype)
    node.attr["value"].tensor.CopyFrom(proto_of(x))


def session_of(graph):
    with tf.Graph().as_default() as imported:
        tf.graph_util.import_graph_def(graph, name="")
    return tf.compat.v1.Session(graph=imported)


def prepare_graph(call):
    """A function that runs the op in a graph that is imported, if it is to run."""
    graph, fed = graph_of(call)
    session = session_of(graph)
    outputs = session.graph.get_operation_by_name("op").outputs
    with session.graph.as_default():
        flat = [tf.reshape(x, [-1]) for x in outputs]  # NumPy cannot hold any shape
    known = [
        x for x in outputs if x.shape.is_fully_defined() and x.shape.num_elements()
    ]

    def run():
        if call.mode == "imported":
            return []
        results, whole = session.run([flat, known], fed)
        for x, result in zip(known, whole):
            if x.shape != result.shape:
                raise AssertionError(f"{x.shape} was inferred, got {result.shape}")
        return results

    return run


# ---- tasks ----


def call_task(seed):
    return Task(seed, lambda: run_call(seed), CALL_SECONDS)


def run_call(seed):
    """Makes the call of a seed twice, on memory that holds other bytes each time."""
    isa = ISAS[seed // CALLS_OF_A_WORKER % len(ISAS)]
    os.environ["SPARSE_ATTENTION_ISA"] = isa  # is read by the first call of a worker
    call = calls.call_of(seed)
    try:
        run = (prepare_eager if call.mode == "eager" else prepare_graph)(call)
        results = []
        for byte in (0x55, 0x3C):
            poison(byte)
            results.append([x.tobytes() for x in run()])
    except AssertionError as error:
        return Result("differs", str(error))
    except (tf.errors.OpError, ValueError, TypeError) as error:
        if call.notes:
            return Result("error", type(error).__name__)
        return Result("refused", str(error))
    if results[0] != results[1]:
        return Result("differs", "what lay in memory before the call came out")
    return Result("success", call.op)


def poison(byte):
    """malloc fills what it gives with ~byte, and what it gets back with byte."""
    m_perturb = -6  # of malloc.h
    ctypes.CDLL(None).mallopt(m_perturb, byte)


def rewriting_task(key, seconds):
    return Task(key, lambda: run_rewriting(key, seconds), seconds + CALL_SECONDS)


def run_rewriting(key, seconds):
    """Runs an op while another thread writes good and bad values over one input.

    The input is a reference variable, whose memory the op reads where it lies.

    Args:
      key: Of `calls.rewritten()`.
      seconds: How long; until the op has met both values, it is a while longer.
    """
    call, bad = calls.rewritten()[key]
    name, good = key[1], call.inputs[key[1]]
    graph, _ = graph_of(call)
    kept = [node for node in graph.node if node.name != name]
    graph = tf.compat.v1.GraphDef(node=kept)
    variable = graph.node.add(name=name, op="VariableV2")
    variable.attr["dtype"].type = enum_of(good.dtype)
    variable.attr["shape"].shape.CopyFrom(shape_proto(good.shape))
    for value, x in ("good", good), ("bad", bad):
        add_constant(graph, value, x)
        assign = graph.node.add(name="to_" + value, op="Assign", input=[name, value])
        assign.attr["T"].type = enum_of(good.dtype)
    session, counts = session_of(graph), collections.Counter()
    session.run("to_good")
    start = time.monotonic()

    def is_over():
        left = start + seconds - time.monotonic()
        return left < (0 if len(counts) == 2 else -CALL_SECONDS / 2)

    def rewrite():
        while not is_over():
            session.run("to_bad")
            session.run("to_good")

    writer = threading.Thread(target=rewrite)
    writer.start()
    while not is_over():
        try:
            session.run("op")
            counts["run"] += 1
        except tf.errors.InvalidArgumentError:
            counts["refused"] += 1
    writer.join()
    detail = f"{counts['run']} times run, {counts['refused']} times refused"
    return Result("success" if len(counts) == 2 else "refused", detail)


# ---- workers ----


def run_tasks(tasks, jobs=1):
    """Yields (task, `Result`) of each `Task`, as workers get through them.

    Calls with neighbouring seeds share a worker. TensorFlow must not have run in this
    process, as a fork would find its threads gone.
    """
    fork = multiprocessing.get_context("fork")
    waiting = [list(group) for _, group in itertools.groupby(tasks, worker_of)]
    workers = {}
    while waiting or workers:
        while waiting and len(workers) < jobs:
            todo, log = waiting.pop(0), tempfile.TemporaryFile()
            receiver, sender = fork.Pipe(duplex=False)
            arguments = todo, sender, log.fileno()
            process = fork.Process(target=work, args=arguments, daemon=True)
            process.start()
            sender.close()
            workers[receiver] = process, todo, log
        for receiver in multiprocessing.connection.wait(list(workers)):
            process, todo, log = workers[receiver]
            try:
                result = receiver.recv()
            except EOFError:  # it has done all, or died
                del workers[receiver]
                process.join()
                if not todo:
                    continue
                result = death(process.exitcode, log)
                waiting[:0] = [todo[1:]] if todo[1:] else []
            yield todo.pop(0), result


def worker_of(task):
    is_call = isinstance(task.label, int)
    return task.label // CALLS_OF_A_WORKER if is_call else task.label


def work(tasks, sender, log):
    """What a worker does: sends the `Result` of each task, or dies of one."""
    os.dup2(log, 2)
    tf.config.threading.set_intra_op_parallelism_threads(3)
    tf.compat.v1.enable_eager_execution()
    context.context().ensure_initialized()
    if not IS_SANITIZED:  # or else the shadow of all memory would not fit
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, 2 * (mapped + MAPPED_BYTES,))
    for task in tasks:
        seconds = task.seconds * (3 if IS_SANITIZED else 1)
        faulthandler.dump_traceback_later(seconds, exit=True)
        before = resident_bytes()
        try:
            result = task.run()
        except Exception as error:
            result = Result("exception", f"{type(error).__name__}: {error}")
        grown = resident_bytes() - before
        if grown > RESIDENT_BYTES:
            result = Result("memory", f"{grown >> 20} MB became resident")
        sender.send(result)


def resident_bytes():
    """The most that this process ever had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def death(exit_code, log):
    """The `Result` of a worker that is no more, from what it said at last."""
    log.seek(0)
    said = log.read().decode(errors="replace")
    signs = {
        "Timeout (": "hang",
        "Check failed": "crash",  # stands before what a sanitizer says of the abort
        "runtime error:": "sanitizer",
        "ERROR: AddressSanitizer": "sanitizer",
    }
    for sign, kind in signs.items():
        if sign in said:
            return Result(kind, said[said.index(sign) :][:3000])
    how = signal.Signals(-exit_code).name if exit_code < 0 else f"status {exit_code}"
    return Result("crash", f"{how}\n{said[-3000:]}")
