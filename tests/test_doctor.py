"""`python -m sparse_attention.doctor`: what it tells, and that it always ends well."""

import json
import os
import sys
import warnings

import numpy as np
import pytest
import tensorflow as tf
from tf_helpers import run_script

from sparse_attention import doctor
from sparse_attention.native import cache, libraries, loader
from sparse_attention.native.cuda import devices, nvrtc

RUN = (
    "import sys; from sparse_attention import doctor; print(doctor.main(sys.argv[1:]))"
)


def fail(*_, **__):
    raise TypeError("broken as can be")


def test_report_names_what_is_used(capsys):
    assert doctor.main() == 0
    lines = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.split("\n")[:6]
    )
    assert lines["TensorFlow"].startswith(tf.__version__)
    assert lines["NumPy"] == np.__version__


def test_json_has_the_facts_of_the_report(capsys):
    assert doctor.main() == 0
    report = capsys.readouterr().out
    assert doctor.main(["--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    lines = [
        f"{subject:<18}{text}"
        for subject, texts in out["facts"].items()
        for text in texts
    ]
    lines += [f"to do             {x['subject']}: {x['remedy']}" for x in out["to do"]]
    assert lines == report.splitlines() and out["right"]
    for subject in ("Keras", "environment", "attention_xla", "in use", "check"):
        assert len(out["facts"][subject]) == 1


def test_library_is_printed_alone_and_loads():
    path, status = run_script(RUN, "--library").splitlines()
    assert status == "0"
    assert hasattr(tf.load_op_library(path), "block_sparse_attention")


def test_no_library_is_said_on_stderr(monkeypatch, capsys):
    why = loader.Loaded(None, "no compiler: g++ does not run")
    monkeypatch.setattr(loader, "_loaded", {"attention_ops": why})
    assert doctor.main(["--library"]) == 1
    out, err = capsys.readouterr()
    assert not out and "no library of ops: no compiler: g++ does not run" in err
    monkeypatch.setattr(loader, "attention_ops", fail)
    assert doctor.main(["--library"]) == 1
    assert "broken as can be" in capsys.readouterr().err


def test_without_tensorflow_it_tells_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "\nTensorFlow        does not import: " in out
    assert "\nto do             TensorFlow: `pip install tensorflow`" in out
    assert "\ncompiler " in out and "failed" not in out


def test_a_broken_tensorflow_is_told(capsys, tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise TypeError('half installed')")
    out = run_script(RUN, PYTHONPATH=os.pathsep.join([str(tmp_path), os.getcwd()]))
    assert "TensorFlow        does not import: half installed" in out
    assert out.splitlines()[-1] == "1"


@pytest.mark.parametrize(
    "room, name",
    [
        (devices, "driver_version"),
        (devices, "devices"),
        (nvrtc, "find_nvrtc"),
        (cache, "cache_folders"),
        (libraries, "compiler"),
        (libraries, "find"),
        (loader, "attention_ops"),
        (doctor, "_largest_error"),
    ],
)
def test_what_fails_is_told_and_hides_nothing_else(room, name, monkeypatch, capsys):
    monkeypatch.setattr(devices, "devices", lambda: [("Some GPU", 90)])
    monkeypatch.setattr(room, name, fail)
    doctor.main()
    out = capsys.readouterr().out
    assert "failed: TypeError: broken as can be" in out
    assert "\nto do             doctor: open an issue with this report" in out
    assert out.startswith("sparse_attention") and "\nTensorFlow " in out
    doctor.main(["--json"])
    assert json.loads(capsys.readouterr().out)["facts"]["doctor"]


def test_what_is_missing_has_a_remedy(monkeypatch, capsys):
    monkeypatch.setattr(devices, "devices", lambda: [("Some GPU", 90)])
    monkeypatch.setattr(devices, "visible_archs", lambda: set())
    monkeypatch.setattr(cache, "cache_folders", lambda: ["/locked", "/tmp/private"])
    monkeypatch.setattr(nvrtc, "nvrtc_paths", lambda: [])
    nvrtc.find_nvrtc.cache_clear()
    why = loader.Loaded(None, "no compiler: g++ does not run")
    monkeypatch.setattr(loader, "_loaded", {"attention_ops": why})
    monkeypatch.setattr(libraries, "compiler", lambda: None)
    with warnings.catch_warnings():  # the report says it, in its place
        warnings.simplefilter("error", RuntimeWarning)
        assert doctor.main() == 0  # TensorFlow's own ops are right
    nvrtc.find_nvrtc.cache_clear()
    out = capsys.readouterr().out
    for remedy in (
        'TensorFlow\'s GPUs: `pip install "tensorflow[and-cuda]"`',
        "cache: /locked cannot be written",
        "NVRTC: no NVRTC is installed (`pip install nvidia-cuda-nvrtc-cu12`",
        "in use: install g++",
    ):
        assert f"\nto do             {remedy}" in out


def test_variables_that_matter_are_told(monkeypatch, capsys):
    monkeypatch.setenv("SPARSE_ATTENTION_VERBOSE", "0")
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    doctor.main()
    told = "SPARSE_ATTENTION_VERBOSE=0, KERAS_BACKEND=tensorflow"
    assert told in capsys.readouterr().out
