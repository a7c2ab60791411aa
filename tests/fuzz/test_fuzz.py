"""No call that somebody crafted ends the process; and the fuzzer sees what does."""

import glob
import os
import re
import subprocess
import sys

import tensorflow as tf
from tf_helpers import run_script

from sparse_attention.native import libraries
from tests.fuzz import calls

IS_TF1 = tf.__version__.startswith("1.")


def test_every_op_is_called():
    registered = set()
    for path in glob.glob(os.path.join(libraries.CSRC, "**", "*.cc"), recursive=True):
        with open(path) as file:
            registered.update(re.findall(r'REGISTER_OP\("(\w+)"\)', file.read()))
    assert len(registered) == 9
    assert {calls.call_of(seed).op for seed in range(200)} == registered
    assert {op for op, _ in calls.rewritten()} == registered


def test_crafted_calls_give_an_error_or_a_result():
    count = 500 if IS_TF1 else 3000
    options = f"--calls {count} --rewrite 0.5 --jobs 2".split()
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-10000:]
    assert f"{count + len(calls.rewritten())} tasks" in ran.stdout


FAULTS = """
import os
import time
import numpy as np
from tests.fuzz import calls, workers

valid = next(seed for seed in range(99) if not calls.call_of(seed).notes)

def call_with(run):
    workers.prepare_eager = workers.prepare_graph = lambda call: run
    return workers.run_call(valid)

def refuse():
    raise ValueError("not today")

def fail_check():
    os.write(2, b"F x.cc:1] Check failed: 0 == 1")
    os.abort()

def report():
    os.write(2, b"ERROR: AddressSanitizer: heap-use-after-free")
    os._exit(1)

faults = [
    ("crash", os.abort),
    ("crash", fail_check),
    ("crash", lambda: os._exit(3)),
    ("hang", lambda: time.sleep(60)),
    ("sanitizer", report),
    ("memory", lambda: np.ones(1 << 27)),
    ("differs", lambda: call_with(lambda: [np.empty(4096)])),
    ("refused", lambda: call_with(refuse)),
    ("exception", lambda: {}["nothing"]),
    ("success", lambda: call_with(lambda: [np.zeros(4096)])),
]
seconds = {"hang": 1, "memory": 60}  # to make it resident takes a while
tasks = [workers.Task(valid, run, seconds.get(kind, 10)) for kind, run in faults]
kinds = [result.kind for _, result in workers.run_tasks(tasks)]
assert kinds == [kind for kind, _ in faults], kinds
assert set(workers.FAILURES) < set(kinds)
print("seen")
"""


def test_faults_are_seen_and_the_next_calls_are_made():
    assert run_script(FAULTS) == "seen\n"
