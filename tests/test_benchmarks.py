"""The benchmarks run, and their figures mean what they say."""

import glob
import importlib
import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from sparse_attention import pattern_block_mask

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "benchmarks")


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("cpu")


def run_quick(folder):
    """`(status, stderr)` of a run that leaves a report and a picture in the folder."""
    command = [sys.executable, os.path.join(FOLDER, "cpu.py"), "--quick"]
    command += ["--modes", "fixed", "--dtypes", "float32", "--threads", "2"]
    command += ["--results", str(folder), "--plot", str(folder / "plot.png")]
    ran = subprocess.run(command, capture_output=True)
    return ran.returncode, ran.stderr.decode()


def test_quick_run_measures_all_contenders(tmp_path):
    status, stderr = run_quick(tmp_path)
    if tf.__version__.startswith("1."):
        assert status != 0
        assert "benchmarks need TensorFlow 2.9 or later, got 1." in stderr
        return
    assert status == 0, stderr
    (path,) = tmp_path.glob("cpu_*.json")
    report = json.loads(path.read_text())
    measured = {(row["contender"], row["phase"]) for row in report["speed"]}
    expected = ["ours", "TF dense", "TF dense, XLA", "TF gather", "TF gather, XLA"]
    assert measured >= {(c, p) for c in expected for p in ("fwd", "fwd+bwd")}
    for row in report["speed"]:
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert 0 < row["share_of_matmul"] < 2
    assert [row["contender"] for row in report["scaling"]] == [
        "ours, threads: 1",
        "ours, threads: 2",
    ] * 2
    assert [row["contender"] for row in report["memory"]] == ["ours"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_patterns_are_compared_in_equal_steps_and_equal_seconds(monkeypatch, tmp_path):
    """With a program in place of the examples that takes 0.5 s a step, or twice that."""
    monkeypatch.syspath_prepend(FOLDER)
    compare_patterns = importlib.import_module("compare_patterns")
    commands, gpus = [], set()

    def run(command, check, env, stdout, stderr):
        assert check
        commands.append(command)
        gpus.add(env["CUDA_VISIBLE_DEVICES"])
        if command[1].endswith("train_lm.py"):
            options = dict(zip(command[2::2], command[3::2]))
            folder = tmp_path / options["--output"] / options["--attention"]
            folder.mkdir(parents=True)
            rate = 0.5 if options["--attention"] == "strided" else 1.0
            steps, epoch = int(options["--steps"]), int(options["--steps-per-epoch"])
            ends = range(epoch, steps + 1, epoch)
            curve = [{"step": n, "seconds": 9 + rate * n, "valid": 2.0} for n in ends]
            config = {"model": {"attention": "x"}, "training": {"steps": steps}}
            (folder / "curve.json").write_text(json.dumps(curve))
            (folder / "config.json").write_text(json.dumps(config))
        else:
            ranges = [(0, 10, 3.0), (10, 40, 1.0)]
            rows = [{"from": a, "to": b, "bits_per_byte": x} for a, b, x in ranges]
            output = tmp_path / command[command.index("--output") + 1]
            output.write_text(json.dumps({command[2]: rows}))

    monkeypatch.setattr(compare_patterns.subprocess, "run", run)
    options = ["--out", str(tmp_path), "--patterns", "dense", "strided"]
    options += "--steps 40 --steps-per-epoch 10 --gpus 0 1 --seed 7".split()
    compare_patterns.main(options)
    assert all(c[c.index("--seed") + 1] == "7" for c in commands if "--steps" in c)
    assert gpus == {"0", "1"}
    report = json.loads((tmp_path / "report.json").read_text())
    found = {(row["pattern"], row["steps"]): row for row in report["rows"]}
    assert set(found) == {("dense", 40), ("strided", 40), ("strided", 80)}
    assert len(found) == len(report["rows"])
    for (pattern, steps), row in found.items():
        seconds = 0.5 if pattern == "strided" else 1.0
        assert row["seconds_a_step"] == seconds
        assert row["curve"][-1]["seconds"] == seconds * steps
        assert row["test"] == 1.5
    assert "steps" not in report["config"]["training"]


def test_processes_are_timed_by_turns(monkeypatch, tmp_path):
    """Two prepare at once; the one that is timed waits for both, and they for it."""
    monkeypatch.syspath_prepend(FOLDER)
    turns = importlib.import_module("turns")
    monkeypatch.setenv("SPARSE_ATTENTION_TURNS", str(tmp_path / "turns"))
    events = []

    def time_it():
        with turns.timing():
            events.append("timed")

    thread = threading.Thread(target=time_it)
    with turns.preparing():
        with turns.preparing():
            thread.start()
            thread.join(0.3)
            events.append("one is ready")
        thread.join(0.3)
        events.append("both are ready")
    thread.join()
    assert events == ["one is ready", "both are ready", "timed"]
    monkeypatch.delenv("SPARSE_ATTENTION_TURNS")
    with turns.timing(), turns.timing():
        pass  # nobody waits


class FakeWorker:
    """Contenders whose results, and times by turn, are given."""

    version, contenders = "fake", ("matmul", "fused", "dense", "gather")

    def __init__(self, folder, results, ms):
        self._folder, self._results, self._ms = folder, results, ms
        self.turns = []

    def ask(self, request, name=None, **_):
        if request == "prepare":
            path = str(self._folder / (name + ".npz"))
            np.savez(path, self._results[name])
            return {"results": path}
        if request == "time":
            self.turns.append(name)
            return {"ms": [self._ms[name].pop(0)]}
        return {}


def test_contenders_are_timed_in_turn_and_only_if_they_agree(cpu, tmp_path):
    ours = np.linspace(-1, 1, 10)
    results = dict(matmul=ours, fused=ours, dense=ours + 1e-5, gather=ours.copy())
    results["gather"][3] += 1e-3
    ms = dict(matmul=[4, 8, 8], fused=[2, 4, 40], dense=[6, 12, 120], gather=[])
    bench = cpu.Bench.__new__(cpu.Bench)
    worker = FakeWorker(tmp_path, results, ms)
    vars(bench).update(workers={"tensorflow": worker}, rounds=3, seconds=1)
    case = cpu.Case("local", "float32", 1024, **cpu.SHAPE)
    rows = bench.speed(case, is_training=False)
    assert worker.turns == ["fused", "dense", "matmul"] * 3
    differs = rows["TF gather"]
    assert differs["error"] == "results differ by 1.0e-03, expected 1.0e-04 at most"
    assert cpu.is_wrong(dict(differs, contender="TF gather")) and "ms" not in differs
    assert rows["TF dense"]["difference"] == pytest.approx(1e-5)
    assert rows["TF dense"]["ms"] == 12
    assert rows["TF dense"]["times_first"] == 3
    assert rows["TF dense"]["ms_low"] == pytest.approx(7.2)
    flops = cpu.useful_flops(case, is_training=False)
    assert rows["ours"]["gflops"] == pytest.approx(flops / 4e6)
    assert rows["ours"]["share_of_matmul"] == pytest.approx(flops / (2 * 2048**3) * 2)
    assert not list(tmp_path.glob("*.npz"))


def test_nan_is_a_difference(cpu):
    good, bad = np.ones(3), np.array([1, np.nan, 1])
    assert "error" not in cpu.check([good, good], [good, good], "dense", "bfloat16")
    assert "error" in cpu.check([good, bad], [good, good], "dense", "bfloat16")


@pytest.mark.parametrize("mode", ["all", "local", "strided", "fixed"])
def test_useful_flops_count_the_pairs_that_attend(cpu, mode):
    case = cpu.Case(mode, "float32", 512, **dict(cpu.SHAPE, heads=2, batch=3))
    pairs = pattern_block_mask(mode, 512, 2, 32, 128, num_verts=1).to_dense().mean()
    flops = 3 * 2 * 512**2 * pairs * 2 * 64 * 2
    assert cpu.useful_flops(case, is_training=False) == flops
    assert cpu.useful_flops(case, is_training=True) == 3.5 * flops


@pytest.mark.parametrize("ms, functions, groups", [(1, 8, 4), (100, 1, 3)])
def test_gpu_groups_wait_once(cpu, monkeypatch, ms, functions, groups):
    """Calls of so many ms, and 5 from the last of them to Python."""
    gpu_tensorflow = importlib.import_module("gpu_tensorflow")
    now, runs = [0.0], []

    def run(sets):
        runs.append("run")
        now[0] += len(sets) * ms / 1e3

    def wait(results):
        runs.append("wait")
        now[0] += 0.005

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(gpu_tensorflow, "time", clock)
    monkeypatch.setattr(gpu_tensorflow, "wait", wait)
    row = gpu_tensorflow.timed(run, [None] * 16)
    assert row["ms"] == pytest.approx(ms + 5 / functions / 16)
    assert runs == 2 * ["run", "wait"] + groups * [*functions * ["run"], "wait"]


def test_the_axis_says_that_the_batch_shrinks_as_the_length_grows(cpu):
    report = importlib.import_module("report")
    (path,) = glob.glob(os.path.join(FOLDER, "results", "gpu_nvidia_*_kernels.json"))
    with open(path) as file:
        batch = json.load(file)["shape"]["batch"]
    assert report.x_label(batch) == "sequence length; batch 65,536 / length"
    assert report.x_label(1) == "sequence length"


PART = """
import sys
import gpu
gpu.emit({"framework": "fake 1", "gpu": "fake", "matmul_tflops": 500.0})
print("not a row", sys.argv[1:])
case = gpu.cases("kernels", ["local"], [16384])[0][0]
for phase in ("fwd", "fwd+bwd"):
    for name, ms in (("ours", 0.5), ("FlexAttention", 1.0)):
        row = dict(case._asdict(), phase=phase, contender=name)
        gpu.emit(dict(row, ms=ms, ms_low=ms, ms_high=ms))
gpu.emit(dict(row, error="out of memory"))
"""


def test_gpu_parts_become_a_report(cpu, tmp_path, monkeypatch, capsys):
    gpu = importlib.import_module("gpu")
    (tmp_path / "gpu_kernels.py").write_text(PART)
    monkeypatch.setattr(gpu, "HERE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", FOLDER)
    plot = tmp_path / "gpu.png"
    arguments = ["--parts", "kernels", "--results", str(tmp_path), "--commit", "abc"]
    if tf.__version__ >= "2":  # and matplotlib is there
        arguments += ["--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    assert gpu.main() == 0
    if tf.__version__ >= "2":
        assert plot.read_bytes().startswith(b"\x89PNG")
    (path,) = tmp_path.glob("gpu_fake_*_abc_kernels.json")
    report = json.loads(path.read_text())
    assert report["machine"]["frameworks"] == ["fake 1"]
    *rows, failed = report["speed"]
    assert [row["times_first"] for row in rows] == [1, 2, 1, 2]
    case = cpu.Case(**{name: rows[0][name] for name in cpu.Case._fields})
    assert rows[0]["gflops"] == cpu.useful_flops(case, False) / 0.5e6
    assert rows[1]["share_of_matmul"] == pytest.approx(rows[0]["gflops"] / 2 / 500e3)
    assert failed["error"] == "out of memory"
    printed = capsys.readouterr().out
    assert "not a row ['--modes', 'all', 'local', 'strided', 'fixed'" in printed
    assert "| local, bfloat16 | 0.5 / 0.5 | 1 / 1 |" in printed
