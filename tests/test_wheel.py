"""A wheel and a source distribution, installed far from the checkout, without a compiler.

SPARSE_ATTENTION_WHEEL names a wheel to test, and SPARSE_ATTENTION_KERNELS the CUDA kernels in
it: arguments of `sparse_attention.build`, with semicolons between those of several runs.
Otherwise a wheel is built, which ships what stands for a kernel.
"""

import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import setuptools
import tensorflow as tf

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SOURCES = (".py", ".cc", ".h", ".cu", ".cuh", ".typed")

# What a user runs first. The mean of equal values is that value.
PROGRAM = """
import numpy as np
import tensorflow as tf
import sparse_attention as sa

print(sa.__file__)
layer = sa.SparseSelfAttention(heads=2, attn_mode="local", local_attn_ctx=16)
print("layer", layer(tf.ones([2, 64, 32])).shape)
block_mask = sa.pattern_block_mask("fixed", 64, 4, 8, local_attn_ctx=32)
x = np.full([2, 64, 32], 0.5, np.float32)
o = sa.block_sparse_attention(x, x, x, block_mask, heads=4)
if not tf.executing_eagerly():
    o = tf.compat.v1.Session().run(o)
print("op", np.ptp(np.array(o)) < 1e-6, np.mean(o))
"""


class Environment:
    """A virtual environment with what was built in it, and TensorFlow of the tests'."""

    def __init__(self, folder, command, given=None):
        """Builds by a command of setup.py, unless a file is given, and installs that."""
        self.folder, self.source = folder, folder / "source"
        ignored = shutil.ignore_patterns(
            ".*", "build", "dist", "*.egg-info", "__pycache__"
        )
        shutil.copytree(ROOT, str(self.source), ignore=ignored)
        # What an older build left must not go into the wheel.
        left = self.source / "build" / "lib" / "sparse_attention" / "csrc" / "left.h"
        left.parent.mkdir(parents=True)
        left.write_text("")
        self.built = given and pathlib.Path(given).resolve()
        if not given:
            dist = folder / "dist"
            self.run(
                *(sys.executable, "setup.py", *command, "--dist-dir", str(dist)),
                cwd=self.source,
            )
            (self.built,) = dist.iterdir()
        self.run(sys.executable, "-m", "venv", str(folder / "venv"))
        self.python = str(folder / "venv" / "bin" / "python")
        # TensorFlow and NumPy from where the tests run: this environment borrows them.
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.packages = self.run(self.python, "-c", code).strip()
        there = os.path.dirname(os.path.dirname(np.__file__))
        with open(os.path.join(self.packages, "borrowed.pth"), "w") as path_file:
            path_file.write(there)
        self.run_without_compiler(
            *("-m", "pip", "install", "--no-deps", "--no-index"),
            *("--no-build-isolation", str(self.built)),
        )

    def run(self, *command, cwd=None, **changes):
        """What a command says, outside of the checkout."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        process = subprocess.run(
            command,
            env=dict(environment, **changes),
            cwd=str(cwd or self.folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.returncode == 0, process.stdout
        return process.stdout

    def run_without_compiler(self, *arguments, **changes):
        cache = str(self.folder / "cache")
        nothing = {"PATH": "", "CXX": "/nothing", "SPARSE_ATTENTION_CACHE_DIR": cache}
        return self.run(self.python, *arguments, **nothing, **changes)

    def sources(self):
        """{str}: the package's files, as they lie in the checkout."""
        found = set()
        for folder, _, names in os.walk(str(self.source / "sparse_attention")):
            place = os.path.relpath(folder, str(self.source))
            found.update(
                os.path.join(place, name) for name in names if name.endswith(SOURCES)
            )
        return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    given = os.environ.get("SPARSE_ATTENTION_WHEEL")
    kernels = tmp_path_factory.mktemp("kernels")
    (kernels / "0123456789abcdef-nvrtc12.9").mkdir()
    (kernels / "0123456789abcdef-nvrtc12.9" / "attention_fwd.bin").write_bytes(b"")
    command = ["bdist_wheel", "--kernels", str(kernels)]
    return Environment(tmp_path_factory.mktemp("wheel"), command, given)


@pytest.fixture(scope="module")
def from_source(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("sdist"), ["sdist"])


def test_wheel_holds_every_source(installed):
    with zipfile.ZipFile(str(installed.built)) as wheel:
        in_wheel = {name for name in wheel.namelist() if name.endswith(SOURCES)}
    assert in_wheel == installed.sources()
    assert "sparse_attention/csrc/cuda/device/attention_fwd.cu" in in_wheel
    assert re.search(r"-py3-none-(linux|manylinux_\d+_\d+)_", installed.built.name)


def test_source_distribution_holds_every_source(from_source):
    with tarfile.open(str(from_source.built)) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert from_source.sources() <= names
    assert {"README.md", "LICENSE", "pyproject.toml", "setup.py"} <= names


def test_source_distribution_runs_without_a_compiler(from_source):
    out = from_source.run_without_compiler("-m", "sparse_attention.doctor")
    assert "in use            TensorFlow's own ops" in out and "right" in out
    assert "op True 0.5" in from_source.run_without_compiler("-c", PROGRAM)


def plain(text):
    """Versions of setuptools write spaces, quotes and dashes in their own ways."""
    return re.sub(r"[\s'\"]", "", text).replace("-", "_")


def test_old_and_new_setuptools_are_told_the_same(installed, monkeypatch):
    """Before 61 it does not read [project], and setup.py reads that for it."""
    with zipfile.ZipFile(str(installed.built)) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith("/METADATA"))
        metadata = plain(wheel.read(name).decode())
    told = {}
    monkeypatch.setattr(setuptools, "__version__", "47.1.0")
    monkeypatch.setattr(setuptools, "setup", told.update)
    runpy.run_path(os.path.join(ROOT, "setup.py"))
    (numpy,), (tensorflow,) = told["install_requires"], told["extras_require"]["tf"]
    for line in (
        f"Name: {told['name']}",
        f"Version: {told['version']}",
        f"Summary: {told['description']}",
        f"Requires-Python: {told['python_requires']}",
        f"Requires-Dist: {numpy}",
        f"Requires-Dist: {tensorflow}",
        "Description-Content-Type: text/markdown",
        "Classifier: License :: OSI Approved :: MIT License",
    ):
        assert plain(line) in metadata, line
    assert told["long_description"].startswith("# sparse_attention")


def test_doctor_finds_the_ops_that_the_wheel_brought(installed):
    out = installed.run_without_compiler("-m", "sparse_attention.doctor")
    assert "attention_ops     shipped in the package" in out
    assert "blocksparse_ops   shipped in the package" in out
    version = tuple(map(int, tf.__version__.split(".")[:2]))
    assert ("attention_xla     shipped" in out) == (version >= (2, 20))
    assert "kernels of " + os.path.realpath(installed.packages) in out
    assert "compiling" not in out
    assert re.search(r"^GPU kernels +[1-9]\d* shipped in the package", out, re.M)


def test_op_and_layer_run(installed):
    out = installed.run_without_compiler("-c", PROGRAM)
    assert installed.packages in out
    assert "layer (2, 64, 32)" in out
    assert "op True 0.5" in out


def test_build_command_finds_all_that_was_shipped(installed):
    for arguments in os.environ.get("SPARSE_ATTENTION_KERNELS", "").split(";"):
        out = installed.run_without_compiler(
            *("-m", "sparse_attention.build", *arguments.split()),
            SPARSE_ATTENTION_NO_JIT="1",  # so that an NVRTC of this machine is not asked
        )
        assert "compil" not in out
