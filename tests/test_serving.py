"""Processes that load the library of ops, and never this package, run our graphs.

They are what TensorFlow Serving, a worker and a server of tf.data are to a program of ours.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from tf_helpers import pattern, random_qkv, run_with_gradients

import sparse_attention as sa
from sparse_attention import doctor

IS_TF1 = tf.__version__.startswith("1.")

# What each begins and ends with; between them it is told the library by sys.argv[1].
BEGIN = """
import importlib.util, sys
import tensorflow as tf
tf.load_op_library(sys.argv[1])
"""
END = """
assert importlib.util.find_spec("sparse_attention") is None
assert "sparse_attention" not in sys.modules
"""

RUN_SAVED_MODEL = """
import numpy as np
kind, folder = sys.argv[2:]
qkv = np.load(folder + "/qkv.npy")
if kind == "session":  # as TensorFlow Serving does
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], folder + "/model")
        signature = meta.signature_def["serving_default"]
        (output,) = signature.outputs.values()
        feeds = {signature.inputs[n].name: x for n, x in zip("qkv", qkv)}
        o = session.run(output.name, feeds)
else:
    served = tf.saved_model.load(folder + "/model").signatures["serving_default"]
    (o,) = served(**{n: tf.constant(x) for n, x in zip("qkv", qkv)}).values()
np.save(folder + "/served.npy", np.array(o))
"""

SERVE_SESSIONS = """
server = tf.distribute.Server({"worker": ["localhost:0"]}, start=True)
print(server.target, flush=True)
sys.stdin.read()
"""

SERVE_DATA = """
service = tf.data.experimental.service
dispatcher = service.DispatchServer()
address = dispatcher.target.split("://")[1]
worker = service.WorkerServer(service.WorkerConfig(dispatcher_address=address))
print(dispatcher.target, flush=True)
sys.stdin.read()
"""


def start(code, *arguments, folder):
    """A process without this package, in a folder, which is given the library first."""
    ran = subprocess.run(
        [sys.executable, "-m", "sparse_attention.doctor", "--library"],
        **{"stdout": subprocess.PIPE, "check": True, "text": True},
    )
    library = ran.stdout.strip()
    assert library.endswith(".so") and os.path.isabs(library)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + code + END, library, *map(str, arguments)],
        **{"cwd": str(folder), "env": environment, "text": True},
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
    )


def stop(process):
    """Lets it go on to its end, which checks what it imported."""
    process.communicate("", timeout=120)
    assert process.returncode == 0


PLAN = pattern("fixed")


def attention(q, k, v):
    return sa.block_sparse_attention(q, k, v, PLAN, heads=4)


@pytest.fixture(scope="module")
def case():
    """q, k and v, and what attention gives here."""
    qkv = random_qkv(PLAN, heads=4)
    (o,), _ = run_with_gradients(
        lambda *x: [attention(*x)], qkv, [np.ones_like(qkv[0])]
    )
    return np.stack(qkv), o


@pytest.mark.parametrize("kind", ["session"] if IS_TF1 else ["session", "function"])
def test_a_saved_model_is_served_by_the_library_alone(kind, case, tmp_path):
    qkv, o = case
    np.save(str(tmp_path / "qkv.npy"), qkv)
    model = str(tmp_path / "model")
    if IS_TF1:
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            inputs = {
                n: tf.compat.v1.placeholder(tf.float32, [None, *x.shape[1:]], n)
                for n, x in zip("qkv", qkv)
            }
            outputs = {"o": attention(**inputs)}
            tf.compat.v1.saved_model.simple_save(session, model, inputs, outputs)
    else:
        module = tf.Module()
        spec = tf.TensorSpec([None, *qkv[0].shape[1:]])
        module.attention = tf.function(attention, input_signature=[spec] * 3)
        tf.saved_model.save(module, model, signatures=module.attention)
    stop(start(RUN_SAVED_MODEL, kind, tmp_path, folder=tmp_path))
    assert np.load(str(tmp_path / "served.npy")).tobytes() == o.tobytes()


def test_a_worker_with_the_library_runs_graphs_and_gradients(case, tmp_path):
    qkv, o = case
    worker = start(SERVE_SESSIONS, folder=tmp_path)
    target = worker.stdout.readline().strip()
    with tf.Graph().as_default(), tf.device("/job:worker/task:0"):
        inputs = [tf.constant(x) for x in qkv]
        there = attention(*inputs)
        gradients = tf.gradients(there, inputs)
        with tf.compat.v1.Session(target) as session:
            got, *got_gradients = session.run([there, *gradients])
    assert "/job:worker/" in there.device
    stop(worker)
    _, here = run_with_gradients(
        lambda *x: [attention(*x)], list(qkv), [np.ones_like(qkv[0])]
    )
    assert got.tobytes() == o.tobytes()
    for g, h in zip(got_gradients, here):
        assert g.tobytes() == h.tobytes()


def test_a_server_of_tf_data_with_the_library_maps_by_the_op(case, tmp_path):
    if IS_TF1:
        assert not hasattr(tf.data.experimental, "service")
        return
    qkv, o = case
    server = start(SERVE_DATA, folder=tmp_path)
    service = server.stdout.readline().strip()
    data = tf.data.Dataset.from_tensors(tuple(qkv)).map(attention)
    data = data.apply(
        tf.data.experimental.service.distribute("parallel_epochs", service)
    )
    (there,) = data.as_numpy_iterator()
    stop(server)
    assert there.tobytes() == o.tobytes()


def test_the_doctor_prints_the_path_and_nothing_else(capsys):
    assert doctor.main(["--library"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
