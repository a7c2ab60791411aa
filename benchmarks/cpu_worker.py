"""Contenders in a process of their own: one runs while the others wait.

`Worker` starts a script and talks to it in lines of JSON. The script serves a table of
contenders with `serve`; what else it prints goes to stderr. NumPy only, so that it runs
beside any framework.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np


class Worker:
    """A process that times contenders on command.

    Args:
      python: Path of the interpreter.
      script: Path of a script that calls `serve`.
      threads: Threads it computes with.

    Attributes:
      contenders: [str], their names.
      version: str, of the framework.
    """

    def __init__(self, python, script, threads):
        self._process = subprocess.Popen(
            [python, script, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            universal_newlines=True,
        )
        answer = self._receive()
        self.contenders, self.version = answer["contenders"], answer["version"]

    def ask(self, request, **arguments):
        """Sends a request to one of `_Server`'s methods and waits for the answer.

        Returns:
          The answer, a dict; with the one key "error" where the contender failed.

        Raises:
          RuntimeError: If the process ended.
        """
        json.dump(dict(arguments, request=request), self._process.stdin)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self):
        line = self._process.stdout.readline()
        if not line:
            command = " ".join(self._process.args)
            raise RuntimeError(f"{command} ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self):
        """Ends the process; it holds memory until then."""
        self._process.communicate()


def serve(contenders, version):
    """Answers requests on stdin until it closes.

    Args:
      contenders: `{name: build}`. `build(case, inputs, is_training)` gets the fields of
        a `Case` as a dict and q, k, v, do: float32 [batch, q_len, heads * head_dim]. It
        returns `run`, which computes o, and with `is_training` dq, dk, dv too, and
        returns when they are there; and `to_numpy`, for one of them to float32 like q.
      version: str, of the framework.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = _Server(contenders)
    answer = {"contenders": list(contenders), "version": version}
    while answer is not None:
        print(json.dumps(answer), file=answers, flush=True)
        line = sys.stdin.readline()
        answer = server.answer(json.loads(line)) if line else None


class _Server:
    def __init__(self, contenders):
        self._contenders, self._runs = contenders, {}

    def answer(self, request):
        try:
            return getattr(self, request.pop("request"))(**request)
        except Exception as error:  # a contender's; any kind
            first_line = (str(error).strip() or "no message").split("\n")[0]
            return {"error": f"{type(error).__name__}: {first_line[:200]}"}

    def prepare(self, name, case, is_training):
        """Builds a contender and runs it once: its results, in a file for the asker."""
        run, to_numpy = self._build(name, case, is_training)
        results = [to_numpy(x) for x in run()]
        with tempfile.NamedTemporaryFile(suffix=".npz", delete=False) as file:
            np.savez(file, *results)
        self._runs[name] = run
        return {"results": file.name}

    def time(self, name, seconds):
        """Times of calls in ms, for at least so many seconds.

        The first call is a warm-up, as others had the caches before; if it takes the
        whole time, it counts.
        """
        run, times = self._runs[name], []
        while not times or sum(times) < seconds:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return {"ms": [1e3 * t for t in times[1:] or times]}

    def forget(self):
        """Drops all that was prepared."""
        self._runs.clear()
        return {}

    def peak_memory(self, name, case, is_training):
        """The most memory in MB that one call held beside its inputs and results.

        Ask a fresh process: memory that was used before does not count again.
        """
        small = dict(case, mode="local", q_len=8 * case["local_attn_ctx"])
        self._build(name, small, is_training)[0]()  # loads and starts what it needs
        run, _ = self._build(name, case, is_training)
        before = _reset_peak()
        results = run()
        peak = _peak()
        if None in (before, peak):
            return {"error": "memory is read from /proc, which is not here"}
        size = {"float32": 4, "bfloat16": 2}[case["dtype"]]
        bytes_returned = sum(size * np.prod(x.shape) for x in results)
        return {"MB": max(0.0, peak - before - bytes_returned / 2**20)}

    def _build(self, name, case, is_training):
        inputs = _inputs(case["batch"], case["q_len"], case["heads"] * case["head_dim"])
        return self._contenders[name](case, inputs, is_training)


@functools.lru_cache(maxsize=1)
def _inputs(*shape):
    """q, k, v, do, the same in every process."""
    random = np.random.RandomState(0)
    return [random.standard_normal(shape).astype(np.float32) for _ in range(4)]


def _reset_peak():
    """Makes the present memory the peak, and returns it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
        return _peak()


def _peak():
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
