"""The cache of what is compiled here: libraries and CUDA kernels.

It lies in `$SPARSE_ATTENTION_CACHE_DIR` or `~/.cache/sparse_attention`; where that cannot
be written, in a private folder of the temporary directory. Paths carry a fingerprint of
all that went into a file, so that one which no longer fits is not found. The size and
SHA-256 of a file lie beside it: a damaged one is not used. One process makes a file while
others wait; a maker that is killed takes its lock along, and had put nothing in place
yet.

Environment:
  SPARSE_ATTENTION_CACHE_DIR: Where compiled files are kept.
  SPARSE_ATTENTION_VERBOSE: 1 to say on stderr what is found and what is run.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time

# ---- places ----


def cache_folders():
    """[str]: where libraries are cached. All are searched; the last is written."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):
        home = os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.environ.get("SPARSE_ATTENTION_CACHE_DIR")
    if not folder and not os.path.isabs(home):  # no home, and no entry in passwd
        return [_private_temp_folder()]
    folder = os.path.abspath(folder or os.path.join(home, "sparse_attention"))
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return [folder]
    return [folder, _private_temp_folder()]


def is_intact(path):
    """Whether a file of the cache is whole, as its record beside it tells."""
    try:
        with open(path, "rb") as file, open(path + ".json") as record:
            return json.load(record) == _record(file.read())
    except (OSError, ValueError):
        return False


def _record(content):
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _private_temp_folder():
    """Nobody else may write where libraries are loaded from."""
    folder = os.path.join(tempfile.gettempdir(), f"sparse_attention-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    info = os.lstat(folder)
    is_ours = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid()
    if not is_ours or info.st_mode & 0o077:
        raise RuntimeError(
            f"{folder} must be a directory of this user with mode 700, got owner "
            f"{info.st_uid} and mode {info.st_mode:o}"
        )
    return folder


# ---- making ----


def make_once(path, make):
    """Makes a file of the cache, by one process while others wait.

    Args:
      path: Where it goes, in a folder of its own.
      make: `make(work, built)` writes the file `built` in the empty folder `work`.

    Returns:
      `path`.
    """
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    with _lock(os.path.join(folder, "lock"), path) as is_locked:
        if is_locked:
            for abandoned in glob.glob(os.path.join(glob.escape(folder), "building-*")):
                shutil.rmtree(abandoned, ignore_errors=True)
        if is_intact(path):
            return path  # another process was first
        with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as work:
            built = os.path.join(work, "built")
            make(work, built)
            with open(built, "rb") as file, open(built + ".json", "w") as record:
                json.dump(_record(file.read()), record)
            os.replace(built, path)
            os.replace(built + ".json", path + ".json")
    return path


@contextlib.contextmanager
def _lock(lock, path):
    """Holds a lock on the file `lock`; False where there are none: several may then compile.

    Who waits says for what: the holder may be stopped, and then it takes for ever.
    """
    import fcntl  # not everywhere, but where compilers are

    try:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's, in a shared cache: to read it is enough
        file = os.open(lock, os.O_RDONLY)
    with os.fdopen(file):
        is_locked = False
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.stderr.write(
                    f"sparse_attention: waiting for another process to make {path}; "
                    f"`fuser {lock}` names it\n"
                )
                fcntl.flock(file, fcntl.LOCK_EX)
            is_locked = True
        try:
            yield is_locked
        finally:
            if is_locked:  # a child that was forked meanwhile has the file open still
                fcntl.flock(file, fcntl.LOCK_UN)


def hash_of(parts):
    """str: the SHA-256 of strings."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# ---- saying ----


def is_set(variable):
    return os.environ.get(variable, "0") not in ("", "0")


@contextlib.contextmanager
def progress(what):
    """One line on stderr: what is compiled, and how long it took."""
    sys.stderr.write(f"sparse_attention: compiling {what}, once ... ")
    sys.stderr.flush()
    start, outcome = time.time(), "failed"
    try:
        yield
        outcome = f"{time.time() - start:.1f} s"
    finally:
        sys.stderr.write(outcome + "\n")


def say(text):
    """Tells those who asked for it with SPARSE_ATTENTION_VERBOSE."""
    if is_set("SPARSE_ATTENTION_VERBOSE"):
        sys.stderr.write(f"sparse_attention: {text}\n")
