"""Turns at a GPU for processes that share it: many may prepare at once, one alone is timed.

A model takes a minute to trace and compile, and a few seconds to time. Several processes
therefore do the first beside each other,

    export SPARSE_ATTENTION_TURNS=turns TF_FORCE_GPU_ALLOW_GROWTH=true
    python benchmarks/keras_hub_models.py --models gpt2 &
    python benchmarks/keras_hub_models.py --models llama &

and are timed one after the other, while none of them prepares. The environment variable
names the file by which they find each other, one for each GPU; without it nobody waits.
"""

import contextlib
import fcntl
import os


def preparing():
    """A context for all that comes before timing. It waits while another is timed."""
    return _holding(fcntl.LOCK_SH)


def timing():
    """A context for what is timed. It waits until no other prepares or is timed."""
    return _holding(fcntl.LOCK_EX)


@contextlib.contextmanager
def _holding(how):
    path = os.environ.get("SPARSE_ATTENTION_TURNS")
    if path is None:
        yield
        return
    with open(path, "a") as file:  # closing it gives the turn back
        fcntl.flock(file, how)
        yield
