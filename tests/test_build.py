"""Finding, compiling and loading the libraries, whatever goes wrong.

The look-up and the cache are tested on stand-in sources that compile in a moment, the
outcome for a user on the real ones in fresh processes (`doctor` exits with 0 where
attention gives the right numbers), unoptimised through $CXX to save time.
"""

import ctypes
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from sparse_attention import build, doctor
from sparse_attention.native import cache, libraries, loader

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PARTS = (
    len(libraries.ISAS) + 2
)  # runs of the compiler for the stand-in: kernels, core, link
STAND_IN = {"spattn_core": ("core.cc", "cpu/kernels.cc")}
OP_PARTS = PARTS + 7  # and for the op: isa.cc, cuda/ and the binding too


class Compiler:
    """g++ behind a script that counts its runs and can be held in the middle of one."""

    def __init__(self, folder):
        self.path = str(folder / "g++-counted")
        self._log, self._hold = folder / "runs", folder / "hold"
        self._log.write_text("")
        self.do('exec g++ "$@" -O0')

    def do(self, command):
        """Has the script run this command of the shell."""
        with open(self.path, "w") as script:
            script.write(
                f"""#!/bin/sh
                [ "$1" = --version ] && exec g++ --version
                echo run >> {self._log}
                while [ -e {self._hold} ]; do sleep 0.05; done
                {command}
                """
            )
        os.chmod(self.path, 0o755)

    def runs(self):
        return len(self._log.read_text().split())

    def hold(self):
        self._hold.write_text("")

    def wait_for_run(self):
        deadline = time.time() + 300
        while self.runs() == 0:
            assert time.time() < deadline, "nothing was compiled"
            time.sleep(0.05)

    def release(self):
        self._hold.unlink()


@pytest.fixture
def compiler(tmp_path):
    return Compiler(tmp_path)


@pytest.fixture
def environment(tmp_path, compiler):
    """Variables for a process that starts with an empty cache."""
    (tmp_path / "tmp").mkdir()
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("SPARSE_ATTENTION_")
    }
    return dict(
        kept,
        PYTHONPATH=ROOT,
        CXX=compiler.path,
        SPARSE_ATTENTION_CACHE_DIR=str(tmp_path / "cache"),
        TMPDIR=str(tmp_path / "tmp"),
    )


@pytest.fixture
def stand_in(tmp_path, compiler, monkeypatch):
    """Sources that compile in a moment, in place of csrc; returns their folder."""
    csrc = tmp_path / "csrc"
    (csrc / "cpu").mkdir(parents=True)
    (csrc / "core.h").write_text("const int kAnswer = 42;\n")
    (csrc / "core.cc").write_text(
        '#include "core.h"\n'
        '#define API extern "C" __attribute__((visibility("default")))\n'
        "API int answer() { return kAnswer; }\n"
    )
    (csrc / "cpu" / "kernels.cc").write_text("\n")
    monkeypatch.setattr(libraries, "CSRC", str(csrc))
    monkeypatch.setattr(libraries, "LIBRARIES", STAND_IN)
    monkeypatch.setenv("CXX", compiler.path)
    monkeypatch.setenv("SPARSE_ATTENTION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSE_ATTENTION_NO_JIT", raising=False)
    return csrc


def answer(path):
    return ctypes.CDLL(path).answer()


def start(environment, *arguments):
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        cwd=environment["TMPDIR"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_doctor(environment):
    return start(environment, "-m", "sparse_attention.doctor")


def finish(process):
    """(what it wrote to stdout, to stderr) once it has ended well."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    return out, err


def fill_cache(environment):
    """Copies the user's library to the cache of `environment`; returns its folder."""
    folder = os.path.dirname(libraries.library("attention_ops"))
    cache = environment["SPARSE_ATTENTION_CACHE_DIR"]
    return shutil.copytree(folder, os.path.join(cache, os.path.basename(folder)))


def files(folder):
    return sorted(name for _, _, names in os.walk(str(folder)) for name in names)


# ---- what a user sees ----


def test_eight_processes_at_once_build_once(environment, compiler):
    compiler.hold()
    processes = [start_doctor(environment) for _ in range(8)]
    compiler.wait_for_run()
    time.sleep(2)  # for the others to come as far as they can
    compiler.release()
    said = [finish(process) for process in processes]
    assert compiler.runs() == OP_PARTS
    assert sum(err.count("compiling attention_ops") for _, err in said) == 1
    assert all("kernels of " in out for out, _ in said)
    cache = environment["SPARSE_ATTENTION_CACHE_DIR"]
    assert files(cache) == ["attention_ops.so", "attention_ops.so.json", "lock"]


def test_killed_build_is_done_anew(environment, compiler):
    compiler.hold()
    killed = start_doctor(environment)
    compiler.wait_for_run()
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    compiler.release()
    cache = environment["SPARSE_ATTENTION_CACHE_DIR"]
    assert "attention_ops.so" not in files(cache)
    out, err = finish(start_doctor(environment))
    assert "kernels of " in out
    (line,) = (x for x in err.splitlines() if "sparse_attention" in x)  # and no other
    assert "compiling attention_ops" in line
    assert files(cache) == ["attention_ops.so", "attention_ops.so.json", "lock"]


def test_read_only_home_builds_in_private_temporary_folder(environment):
    # Root may write anywhere but below what is no directory.
    del environment["SPARSE_ATTENTION_CACHE_DIR"]
    environment.pop("XDG_CACHE_HOME", None)
    environment["HOME"] = os.devnull
    out, _ = finish(start_doctor(environment))
    folder = os.path.join(environment["TMPDIR"], f"sparse_attention-{os.getuid()}")
    assert f"kernels of {folder}{os.sep}" in out
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700


def test_truncated_library_is_built_anew(environment, compiler):
    copy = fill_cache(environment)
    out, err = finish(start_doctor(environment))
    assert "attention_ops     cached\n" in out and compiler.runs() == 0
    os.truncate(os.path.join(copy, "attention_ops.so"), 5000)
    out, err = finish(start_doctor(environment))
    assert f"kernels of {copy}" in out
    assert err.count("compiling attention_ops") == 1
    assert compiler.runs() == OP_PARTS


def test_no_compiler_gives_right_numbers_and_one_warning(environment):
    script = (
        "import warnings; import sparse_attention as sa, tensorflow as tf\n"
        "from sparse_attention import doctor\n"
        "plan = sa.pattern_block_mask('local', 32, 2, 16, local_attn_ctx=16)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for x in [tf.ones([1, 32, 16])] * 2:\n"
        "        sa.block_sparse_attention(x, x, x, plan, heads=2)\n"
        "assert doctor.main() == 0 == doctor.main()\n"
        "print([str(w.message) for w in caught if 'compiled' in str(w.message)])\n"
    )
    environment["CXX"] = "missing-g++"
    out, err = finish(start(environment, "-c", script))
    assert "no compiler: missing-g++ does not run" in out
    assert out.count("in use            TensorFlow's own ops") == 2
    assert "compiling" not in err
    (warning,) = eval(out.splitlines()[-1])
    assert "cannot be compiled here" in warning


def test_building_ahead_makes_the_same_kernels_with_tensorflow_as_without(monkeypatch):
    arguments = "--arch sm_80,sm_90a --dtype float16 --head-dim 64 --block-size 32"
    made = []
    for is_there in (True, False):
        if not is_there:
            monkeypatch.setitem(sys.modules, "tensorflow", None)
        made.append(set())
        compiled = lambda *kernel, of=made[-1]: of.add(kernel)  # noqa: E731
        monkeypatch.setattr(build.kernels, "compiled", compiled)
        assert build.main(arguments.split()) == 0
    assert made[0] == made[1]
    names = {name for name, _, _ in made[0]}
    assert {"attention_fwd", "blocks_nt"} <= names


@pytest.mark.parametrize("is_there", [True, False])
def test_building_ahead_says_what_is_in_its_way(
    is_there, monkeypatch, tmp_path, capsys
):
    for name, value in ("NO_JIT", "1"), ("CACHE_DIR", str(tmp_path)):
        monkeypatch.setenv("SPARSE_ATTENTION_" + name, value)
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(libraries, "PACKAGE", str(tmp_path))
    if not is_there:
        monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert build.main([]) == 1
    what = "attention_ops" if is_there else "spattn_core"
    said = f"{what} cannot be had: SPARSE_ATTENTION_NO_JIT is set\n"
    assert capsys.readouterr().err == said


def test_building_ahead_names_what_is_wrong_with_the_cache(
    stand_in, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    path = libraries.build_core()
    os.remove(path)
    lock = os.path.join(os.path.dirname(path), "lock")
    os.remove(lock)
    os.mkdir(lock)
    assert build.main([]) == 1
    assert f"Is a directory: '{lock}'" in capsys.readouterr().err


def test_doctor_fails_on_wrong_numbers(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_largest_error", lambda: np.nan)
    assert doctor.main() == 1
    assert "WRONG" in capsys.readouterr().out


def test_ops_are_loaded_once_by_many_threads(monkeypatch):
    opened = []

    def slow_open(name):
        opened.append(name)
        time.sleep(0.2)
        return name

    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(loader, "_open", slow_open)
    threads = [threading.Thread(target=loader.attention_ops) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == ["attention_ops"]


def test_library_that_does_not_load_is_passed_over(monkeypatch, tmp_path):
    bad = tmp_path / "bad.so"
    bad.write_text("no library")
    good = libraries.library("attention_ops")
    calls = []

    def library(name, unfit):
        calls.append(list(unfit))
        return good if unfit else str(bad)

    monkeypatch.setattr(libraries, "library", library)
    loaded = loader._open("attention_ops")
    assert loaded.ops.path == good and loaded.why_not is None
    assert calls == [[], [str(bad)]]


# What a call says where the kernels cannot be had: once, and the numbers are right.
THREE_CALLS = """
import warnings
import numpy as np
import sparse_attention as sa
block_mask = sa.BlockMask(np.ones([1, 2, 2]), sa.causal_mask(), 8)
x = np.ones([1, 16, 8], np.float32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        sa.block_sparse_attention(x, x, x, block_mask, heads=1)
said = [str(w.message) for w in caught if w.category is RuntimeWarning]
print([text for text in said if "kernels" in text])  # NumPy warns, too, in TensorFlow 1
try:
    sa.load_ops()
except RuntimeError as error:
    print(error)
"""
COMPILERS = {
    # An old g++, a program that writes nothing, and one whose product does not load.
    "echo 'unrecognized option -std=c++17: error' >&2; exit 1": "ended with status 1, "
    "expected 0: unrecognized option -std=c++17: error (g++",
    "exit 0": "wrote no library",
    'for a; do [ "$last" = -o ] && echo no library > $a; last=$a; done': "does not load",
}


@pytest.mark.parametrize("script", COMPILERS)
def test_unfit_compiler_runs_once_and_one_warning_says_why(
    script, environment, compiler
):
    compiler.do(script)
    out, err = finish(start(environment, "-c", THREE_CALLS))
    warned, refused = out.splitlines()
    (warning,) = eval(warned)
    assert COMPILERS[script] in warning and COMPILERS[script] in refused
    assert err.count("compiling attention_ops") == 1


@pytest.mark.parametrize("what", ["attention_ops.so", "lock"])
def test_folder_in_the_place_of_a_file_is_said_once(what, environment, compiler):
    copy = fill_cache(environment)
    os.remove(os.path.join(copy, "attention_ops.so.json"))
    os.remove(os.path.join(copy, what))
    os.mkdir(os.path.join(copy, what))
    compiler.do('for a; do [ "$last" = -o ] && echo > $a; last=$a; done')
    out, err = finish(start(environment, "-c", THREE_CALLS))
    (warning,) = eval(out.splitlines()[0])
    assert "Is a directory" in warning
    assert err.count("compiling attention_ops") <= 1


def test_without_a_home_the_cache_is_a_private_temporary_folder(
    environment, monkeypatch
):
    for name in ("SPARSE_ATTENTION_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # nor in passwd
    monkeypatch.setattr(cache.tempfile, "tempdir", environment["TMPDIR"])
    assert cache.cache_folders() == [
        os.path.join(environment["TMPDIR"], f"sparse_attention-{os.getuid()}")
    ]


# ---- look-up and cache, on stand-in sources ----


def test_library_is_compiled_once_and_then_cached(stand_in, compiler, capsys):
    path = libraries.build_core()
    assert answer(path) == 42
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sparse_attention: compiling spattn_core with g++")
    assert line.endswith(" s")
    assert libraries.build_core() == path
    assert libraries.find("spattn_core") == (path, "cached")
    assert compiler.runs() == PARTS
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "part", ["header", "source", "flag", "version", "compiler", "its arguments"]
)
def test_fingerprint_follows(part, stand_in, compiler, monkeypatch):
    before = libraries.build_core()
    if part == "header":
        (stand_in / "core.h").write_text("const int kAnswer = 43;\n")
    elif part == "source":
        with open(str(stand_in / "cpu" / "kernels.cc"), "a") as file:
            file.write("static int unused;\n")
    elif part == "version":
        monkeypatch.setattr(libraries.sparse_attention, "__version__", "0")
    elif part == "compiler":
        with open(compiler.path) as file:
            script = file.read().replace("exec g++ --version", "exec echo another")
        with open(compiler.path, "w") as file:
            file.write(script)
    elif part == "its arguments":
        monkeypatch.setenv("CXX", compiler.path + " -g")
    after = libraries.build_core(["-DFLAG"] if part == "flag" else [])
    assert after != before
    assert answer(after) == (43 if part == "header" else 42)


def test_fingerprint_ignores_sources_of_other_libraries(stand_in):
    before = libraries.build_core()
    (stand_in / "another.cc").write_text("\n")
    assert libraries.build_core() == before


def test_shipped_library_serves_its_minor_tensorflow_only(monkeypatch):
    def prebuilt(version):
        monkeypatch.setattr(libraries, "_tensorflow", lambda: (version, ["-DX"], []))
        return libraries.prebuilt("attention_ops")

    assert prebuilt("2.21.0") == prebuilt("2.21.1")
    assert prebuilt("2.21.0") != prebuilt("2.22.0")


@pytest.mark.parametrize("variable", ["SPARSE_ATTENTION_NO_JIT", "CXX"])
def test_a_wheel_for_another_tensorflow_is_named(variable, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, "1")  # is no compiler
    monkeypatch.setattr(libraries, "PACKAGE", str(tmp_path))
    monkeypatch.setattr(libraries, "_tensorflow", lambda: ("2.5.3", [], []))
    here = libraries.prebuilt("attention_ops")
    os.makedirs(os.path.dirname(here))
    plain = libraries.why_no_compiling("attention_ops")
    open(here.replace("tf2.5", "tf2.4"), "w").close()
    why = libraries.why_no_compiling("attention_ops")
    assert plain in why and "for TensorFlow 2.4, and this is 2.5.3" in why
    assert libraries.why_no_compiling("blocksparse_ops") == plain
    open(here, "w").close()
    assert libraries.why_no_compiling("attention_ops") == plain


def test_shipped_library_comes_before_cached_unless_broken(
    stand_in, monkeypatch, tmp_path
):
    monkeypatch.setattr(libraries, "PACKAGE", str(tmp_path / "package"))
    cached = libraries.build_core()
    shipped = libraries.prebuilt("spattn_core")
    os.makedirs(os.path.dirname(shipped))
    shutil.copy(cached, shipped)
    assert libraries.find("spattn_core") == (
        cached,
        "cached",
    )  # until its record is there
    shutil.copy(cached + ".json", shipped + ".json")
    assert libraries.find("spattn_core") == (shipped, "shipped in the package")
    assert libraries.library("spattn_core", unfit=[shipped]) == cached
    assert libraries.build_core(["-DFLAG"]) not in (shipped, cached)


def test_whole_library_that_does_not_load_is_not_compiled_again(stand_in, compiler):
    path = libraries.build_core()
    assert libraries.library("spattn_core", unfit=[path]) is None
    assert compiler.runs() == PARTS


def test_clang_is_given_no_flag_of_gcc(stand_in, compiler, tmp_path):
    flags = tmp_path / "flags"
    for version, is_given in ("Debian clang version 14.0.6", False), ("g++ 12", True):
        compiler.do(f'echo "$@" >> {flags}; exec g++ "$@" -O0')
        with open(compiler.path) as file:
            script = file.read().replace("exec g++ --version", f"exec echo {version}")
        with open(compiler.path, "w") as file:
            file.write(script)
        flags.write_text("")
        libraries.build_core()
        for flag in libraries.GCC_FLAGS:
            assert (flag in flags.read_text()) == is_given


def flip_byte(path):
    with open(path, "r+b") as file:
        file.seek(2000)
        byte = file.read(1)
        file.seek(2000)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 1000),
        lambda path: os.truncate(path, 0),
        flip_byte,
        lambda path: os.truncate(path + ".json", 10),
        lambda path: os.remove(path + ".json"),
        os.remove,
    ],
    ids=["truncated", "empty", "flipped", "record truncated", "no record", "no file"],
)
def test_damaged_library_is_built_anew(damage, stand_in, compiler):
    path = libraries.build_core()
    damage(path)
    assert libraries.find("spattn_core").path is None
    assert libraries.build_core() == path
    assert answer(path) == 42
    assert compiler.runs() == 2 * PARTS


def build_script(stand_in):
    return (
        "from sparse_attention.native import libraries\n"
        f"libraries.CSRC, libraries.LIBRARIES = {str(stand_in)!r}, {STAND_IN!r}\n"
        "print(libraries.build_core())"
    )


def start_held(compiler, environment, script):
    """A process that builds, stopped where it waits for the compiler."""
    compiler.hold()
    builder = start(environment, "-c", script)
    compiler.wait_for_run()
    return builder


def test_who_waits_for_a_builder_that_is_stopped_says_so(
    stand_in, compiler, environment
):
    script = build_script(stand_in)
    builder = start_held(compiler, environment, script)
    os.killpg(builder.pid, signal.SIGSTOP)
    waiter = start(environment, "-c", script)
    try:
        assert select.select([waiter.stderr], [], [], 60)[0], (
            "it waits and says nothing"
        )
        line = waiter.stderr.readline()
        assert "waiting for another process to make " in line
        lock = line.split("`")[1].split()
        assert lock[0] == "fuser" and os.path.basename(lock[1]) == "lock"
        assert os.path.isfile(lock[1])
    finally:
        compiler.release()
        os.killpg(builder.pid, signal.SIGCONT)
    paths = {finish(process)[0] for process in (builder, waiter)}
    assert len(paths) == 1 and compiler.runs() == PARTS


def test_lock_of_another_user_is_locked_all_the_same(stand_in, compiler, monkeypatch):
    path = libraries.build_core()
    os_open, flags_of_lock = os.open, []

    def open_as_another(file, flags, *args, **kwargs):
        if os.path.basename(str(file)) == "lock":
            flags_of_lock.append(flags)
            if flags & os.O_RDWR:
                raise PermissionError(13, "Permission denied", file)
        return os_open(file, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_as_another)
    os.remove(path)
    assert libraries.build_core() == path and answer(path) == 42
    assert len(flags_of_lock) == 2


def test_builder_killed_without_its_compilers_leaves_no_lock(
    stand_in, compiler, environment
):
    script = build_script(stand_in)
    killed = start_held(compiler, environment, script)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    compiler.release()
    out, _ = finish(start(environment, "-c", script))
    assert answer(out.strip()) == 42
    cache = environment["SPARSE_ATTENTION_CACHE_DIR"]
    assert files(cache) == ["lock", "spattn_core.so", "spattn_core.so.json"]


def test_no_jit_never_compiles(stand_in, compiler, monkeypatch):
    monkeypatch.setenv("SPARSE_ATTENTION_NO_JIT", "1")
    assert libraries.build_core() is None
    assert libraries.find("spattn_core") == (None, "SPARSE_ATTENTION_NO_JIT is set")
    assert compiler.runs() == 0
    monkeypatch.setenv("SPARSE_ATTENTION_NO_JIT", "0")
    path = libraries.build_core()
    monkeypatch.setenv("SPARSE_ATTENTION_NO_JIT", "1")
    assert libraries.build_core() == path


def test_cached_library_needs_no_compiler(stand_in, monkeypatch):
    path = libraries.build_core()
    monkeypatch.setenv("CXX", "missing-g++")
    assert libraries.build_core() == path


@pytest.mark.parametrize("command", ["missing-g++", "false", os.devnull, 'g++ "'])
def test_no_compiler_is_said(command, stand_in, monkeypatch):
    monkeypatch.setenv("CXX", command)
    assert libraries.build_core() is None
    why = libraries.find("spattn_core").why
    assert why == f"no compiler: {command} does not run"


def test_compile_error_shows_command_and_end_of_output(stand_in, capsys):
    with open(str(stand_in / "core.cc"), "a") as file:
        file.write("\n".join(f"wrong{i} line;" for i in range(30)))
    with pytest.raises(RuntimeError) as error:
        libraries.build_core()
    first, command, *said = str(error.value).splitlines()
    assert first == "the compiler ended with status 1, expected 0:"
    assert f"-c {stand_in}/core.cc" in command
    assert len(said) == 20
    assert "wrong29" in "".join(said) and "wrong0 " not in "".join(said)
    assert capsys.readouterr().err.endswith("once ... failed\n")


def test_verbose_says_what_runs_and_is_found(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("SPARSE_ATTENTION_VERBOSE", "1")
    path = libraries.build_core()
    assert libraries.build_core() == path
    err = capsys.readouterr().err
    assert err.count(" -c ") == PARTS - 1 and err.count(" -shared ") == 1
    assert f"spattn_core: compiled, {path}\n" in err
    assert f"spattn_core: cached, {path}\n" in err


def test_cache_is_under_xdg_cache_home_or_home(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARSE_ATTENTION_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folders() == [str(tmp_path / "xdg" / "sparse_attention")]
    monkeypatch.setenv("XDG_CACHE_HOME", "not absolute")
    assert cache.cache_folders() == [str(tmp_path / ".cache" / "sparse_attention")]


@pytest.mark.parametrize("trap", ["writable by others", "a link", "a file"])
def test_temporary_folder_that_is_not_private_is_refused(trap, monkeypatch, tmp_path):
    folder = tmp_path / f"sparse_attention-{os.getuid()}"
    if trap == "a file":
        folder.write_text("")
    elif trap == "a link":
        (tmp_path / "elsewhere").mkdir(0o700)
        folder.symlink_to("elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    monkeypatch.setenv("SPARSE_ATTENTION_CACHE_DIR", os.path.join(os.devnull, "cache"))
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RuntimeError, match="must be a directory of this user"):
        cache.cache_folders()
