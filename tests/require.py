"""What GPU tests want: without it they skip, or fail as SPARSE_ATTENTION_REQUIRE says."""

import importlib
import os

import pytest


def is_required(gpus=1):
    """Whether tests that want so many GPUs are to fail rather than skip."""
    required = os.environ.get("SPARSE_ATTENTION_REQUIRE", "").split(",")
    return "2gpu" in required or gpus == 1 and "gpu" in required


def import_or_skip(name):
    """The module, for the top of a test file: without it, the file skips or fails."""
    return importlib.import_module(name) if is_required() else pytest.importorskip(name)
