"""A forked process: our ops hang there where TensorFlow's own do, and nowhere else.

The threads of TensorFlow's pools do not live on in a child, which waits for them for ever,
once its parent has run anything. What runs in the calling thread alone still works.
"""

import json
import os
import threading

import pytest
from tf_helpers import run_script

from sparse_attention.native import cache, loader

# Forks once for each call, and prints the names of those that end in time.
FORKS = """
import json
import os
import sys
import time

import numpy as np
import tensorflow as tf

import sparse_attention as sa

tf.compat.v1.enable_eager_execution()
small, large = np.ones([1, 32, 64], "f"), np.ones([4, 1024, 256], "f")
plans = {x.shape[1]: sa.pattern_block_mask("all", x.shape[1], 1) for x in (small, large)}


def tensorflow(x):
    return tf.matmul(x, x, transpose_b=True)


def ours(x):
    return sa.block_sparse_attention(x, x, x, plans[int(x.shape[1])], heads=1)


def in_function(function):
    return lambda x: tf.function(function)(tf.constant(x))


calls = {
    "tensorflow small": (tensorflow, small),
    "ours small": (ours, small),
    "tensorflow large": (tensorflow, large),
    "ours large": (ours, large),
    "tensorflow function": (in_function(tensorflow), small),
    "ours function": (in_function(ours), small),
}
sa.load_ops()
for name in sys.argv[2:]:
    function, x = calls[name]
    function(x).numpy()
children = {}
for name, (function, x) in calls.items():
    child = os.fork()
    if not child:
        shape = function(x).numpy().shape
        os._exit(len(shape) != 3)
    children[child] = name
deadline, ended = time.time() + float(sys.argv[1]), []
while children and time.time() < deadline:
    child, status = os.waitpid(-1, os.WNOHANG)
    if child:
        ended.append((children.pop(child), status))
    time.sleep(0.02)
for child in children:
    os.kill(child, 9)
    os.waitpid(child, 0)
print(json.dumps(sorted(ended)))
"""


@pytest.mark.parametrize("before", ["nothing", "tensorflow small", "ours large"])
def test_our_ops_hang_no_more_than_tensorflows(before):
    limit = 120 if before == "nothing" else 20  # seconds; then all of them end
    arguments = [] if before == "nothing" else [before]
    ended = dict(json.loads(run_script(FORKS, limit, *arguments).splitlines()[-1]))
    assert set(ended.values()) == {0}
    for name in "small", "large", "function":
        assert f"ours {name}" in ended or f"tensorflow {name}" not in ended
    # TensorFlow's own small product may hang too: whether it waits for a pool depends on the CPU.
    assert "ours small" in ended
    if before == "nothing":
        assert len(ended) == 6


# ---- locks of our own ----


def ends_in_a_fork(function):
    """Whether a forked process comes back from the function within 10 s."""
    child = os.fork()
    if not child:
        threading.Timer(10, os._exit, [1]).start()
        function()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_a_fork_while_another_thread_loads_the_ops_does_not_wait_for_it(monkeypatch):
    monkeypatch.setattr(loader, "_open", lambda name: loader.Loaded(name, None))
    monkeypatch.setattr(loader, "_loaded", {})
    with loader._lock:
        assert ends_in_a_fork(loader.attention_ops)


def test_a_child_forked_while_a_file_is_made_does_not_keep_its_lock(tmp_path):
    read, write = os.pipe()
    children = []

    def make(work, built):
        children.append(os.fork())
        if not children[-1]:
            os.close(write)
            os.read(read, 1)  # until the parent closes its end
            os._exit(0)
        with open(built, "w") as file:
            file.write("made")

    path = str(tmp_path / "folder" / "file")
    try:
        cache.make_once(path, make)
        os.remove(path)
        assert ends_in_a_fork(lambda: cache.make_once(path, make_text))
    finally:
        os.close(write)
        os.waitpid(children[0], 0)


def make_text(work, built):
    with open(built, "w") as file:
        file.write("made")
