"""The scripts of examples/ as modules, and what their runs leave."""

import contextlib
import importlib
import os
import sys

import h5py

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "examples")


@contextlib.contextmanager
def example(name):
    """The script as a module, which finds its neighbours for as long as this lasts."""
    sys.path.insert(0, FOLDER)
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(FOLDER)


def read_weights(folder):
    """All arrays of a run's checkpoint, optimizer included, by name."""
    arrays = {}

    def keep(name, item):
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    with h5py.File(os.path.join(folder, "checkpoint.weights.h5"), "r") as file:
        file.visititems(keep)
    return arrays
