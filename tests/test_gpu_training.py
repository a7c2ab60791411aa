"""The benchmark of training runs in small, and finds what it says."""

import importlib
import json
import os
import re

import pytest
import tensorflow as tf

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "benchmarks")
NAMES = ["dense", "fixed", "strided", "TensorFlow dense"]


@pytest.fixture
def gpu_training(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("gpu_training")


def run(gpu_training, folder, *arguments, part="speed"):
    """The rows of a part."""
    small = ["--small", "--parts", part, "--out", str(folder)]
    gpu_training.main([*small, *arguments])
    path = folder / "gpu_training.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def test_all_contenders_train(gpu_training, tmp_path, monkeypatch):
    dense, batches = gpu_training.sa.attention_impl, []

    def attention_impl(q, *rest):
        batches.append(q.shape[0])
        return dense(q, *rest)

    monkeypatch.setattr(gpu_training.sa, "attention_impl", attention_impl)
    rows = run(gpu_training, tmp_path)
    assert [row["attention"] for row in rows] == NAMES
    assert all(row["seconds_a_step"] > 0 for row in rows)
    assert set(batches) == {1} == {rows[-1]["batch"]}  # the others have 2


def test_a_step_of_a_million(gpu_training, tmp_path):
    (row,) = run(gpu_training, tmp_path, part="million")
    assert row["attention"] == "strided" and row["seconds_a_step"] > 0
    assert (row["length"], row["block_size"]) == (256, 16)


def test_contenders_are_chosen(gpu_training, capsys):
    chosen = ["--attention", "TensorFlow dense", "fixed"]
    gpu_training.main(["--small", "--seconds", "-1", *chosen])
    left_out = r"left out: {'part': '(.*?)', 'attention': '(.*?)'"
    points = re.findall(left_out, capsys.readouterr().out)
    for part, count in (("speed", 1), ("memory", 2)):
        assert [name for p, name in points if p == part] == count * chosen[1:]
    assert {name for p, name in points if p == "length"} == {"fixed"}


def test_errors_are_rows_and_an_end_is_kept(
    gpu_training, tmp_path, monkeypatch, capsys
):
    def train_function(self, row):
        raise tf.errors.ResourceExhaustedError(None, None, "scores")

    monkeypatch.setattr(gpu_training.Benchmark, "train_function", train_function)
    assert run(gpu_training, tmp_path, "--seconds", "-1") == []
    assert capsys.readouterr().out.count("left out: ") == 4
    rows = run(gpu_training, tmp_path)
    assert [row["error"] for row in rows] == ["out of memory"] * 4
    assert capsys.readouterr().out.count(": out of memory (") == 4


@pytest.mark.parametrize("capacity", [50, 150, 400, 1000, 10000])
@pytest.mark.parametrize("first", [100, 400, 3200])
def test_the_longest_length_is_found(gpu_training, monkeypatch, capacity, first):
    bench = gpu_training.Benchmark.__new__(gpu_training.Benchmark)
    lengths = [100, 200, 300, 400, 800, 1600, 3200]
    sizes = {"layers": 1, "lengths": lengths, "first": {True: first}}
    measured = []

    def measure(part, contender, length, layers, recompute):
        measured.append(length)
        return {} if length <= capacity else {"error": "out of memory"}

    vars(bench).update(sizes={"length": sizes}, measure=measure)
    fit = [None, *[length for length in lengths if length <= capacity]]
    assert bench.longest("fixed", recompute=True) == fit[-1]
    assert measured[0] == first and len(set(measured)) == len(measured)


def test_the_users_model_runs_with_every_attention(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    keras_model = importlib.import_module("keras_model")
    monkeypatch.setattr(keras_model, "WIDTH", 64)
    monkeypatch.setattr(keras_model, "BLOCKS", 1)
    out, contenders = tmp_path / "rows.json", list(keras_model.CONTENDERS)
    shape = ["--shapes", "1x128", "--policies", "float32", "--steps", "1"]
    keras_model.main([*shape, "--contenders", *contenders, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["contender"] for row in rows] == contenders
    assert all(row["ms"] > 0 and "error" not in row for row in rows)
