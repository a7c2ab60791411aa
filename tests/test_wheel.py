"""A wheel, installed in a new environment far from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

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
    """A virtual environment with the wheel in it, and TensorFlow of the tests'."""

    def __init__(self, folder):
        self.folder, self.source = folder, folder / "source"
        ignored = shutil.ignore_patterns(
            ".*", "build", "dist", "*.egg-info", "__pycache__"
        )
        shutil.copytree(ROOT, str(self.source), ignore=ignored)
        # What an older build left must not go into the wheel.
        left = self.source / "build" / "lib" / "sparse_attention" / "csrc" / "left.h"
        left.parent.mkdir(parents=True)
        left.write_text("")
        self.run(
            *(sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(folder)),
            cwd=self.source,
        )
        (self.wheel,) = folder.glob("*.whl")
        self.run(sys.executable, "-m", "venv", str(folder / "venv"))
        self.python = str(folder / "venv" / "bin" / "python")
        # TensorFlow and NumPy from where the tests run: this environment borrows them.
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.packages = self.run(self.python, "-c", code).strip()
        there = os.path.dirname(os.path.dirname(np.__file__))
        with open(os.path.join(self.packages, "borrowed.pth"), "w") as path_file:
            path_file.write(there)
        self.run(
            *(self.python, "-m", "pip", "install", "--no-deps", "--no-index"),
            str(self.wheel),
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

    def run_without_compiler(self, *arguments):
        cache = str(self.folder / "cache")
        return self.run(
            *(self.python, *arguments),
            **{"PATH": "", "CXX": "", "SPARSE_ATTENTION_CACHE_DIR": cache},
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_every_source(installed):
    in_tree = set()
    for folder, _, names in os.walk(str(installed.source / "sparse_attention")):
        place = os.path.relpath(folder, str(installed.source))
        in_tree.update(
            os.path.join(place, name) for name in names if name.endswith(SOURCES)
        )
    with zipfile.ZipFile(str(installed.wheel)) as wheel:
        in_wheel = {name for name in wheel.namelist() if name.endswith(SOURCES)}
    assert in_wheel == in_tree
    assert "sparse_attention/csrc/cuda/device/attention_fwd.cu" in in_wheel
    assert "-py3-none-linux_" in installed.wheel.name


def test_doctor_finds_the_ops_that_the_wheel_brought(installed):
    out = installed.run_without_compiler("-m", "sparse_attention.doctor")
    assert "attention_ops     shipped in the package" in out
    assert "kernels of " + os.path.realpath(installed.packages) in out
    assert "compiling" not in out


def test_op_and_layer_run(installed):
    out = installed.run_without_compiler("-c", PROGRAM)
    assert installed.packages in out
    assert "layer (2, 64, 32)" in out
    assert "op True 0.5" in out


def test_build_command_runs(installed):
    out = installed.run_without_compiler("-m", "sparse_attention.build")
    assert "compil" not in out
