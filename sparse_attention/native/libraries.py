"""Finds the compiled libraries, and compiles them with g++ where there are none.

A library is looked for, in this order,
  1. in the package, where a wheel may have brought it (`prebuilt/`),
  2. in the user's cache (`cache.py`),
  3. and is otherwise compiled into the cache.

Environment:
  SPARSE_ATTENTION_NO_JIT: 1 to compile nothing.
  CXX: The compiler; `g++` by default.
"""

import collections
import concurrent.futures
import functools
import glob
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from subprocess import DEVNULL, PIPE, STDOUT

import sparse_attention

from . import cache

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CSRC = os.path.join(PACKAGE, "csrc")

# Sources named *kernels.cc are compiled once for each of ISAS, those in tf/ and xla/ for
# TensorFlow.
ATTENTION = (
    "cpu/attention.cc",
    "cpu/attention_kernels.cc",
    "cuda/host/configs.cc",
    "cuda/host/launch.cc",
    "cuda/host/rule.cc",
)
BLOCKSPARSE = (
    "cpu/blocksparse.cc",
    "cpu/blocksparse_kernels.cc",
    "cuda/host/blocks_launch.cc",
)
SHARED = ("cpu/isa.cc", "cuda/host/driver.cc", "cuda/host/modules.cc")
LIBRARIES = {
    "spattn_core": (*SHARED, *ATTENTION, *BLOCKSPARSE),
    "attention_ops": (*SHARED, *ATTENTION, "tf/attention_op.cc"),
    "blocksparse_ops": (*SHARED, *BLOCKSPARSE, "tf/blocksparse_ops.cc"),
    # This takes the longest to compile, so it is made only where XLA compiles our op.
    "attention_xla": (
        *SHARED,
        *ATTENTION,
        "xla/attention_handlers.cc",
        "xla/attention_xla_ops.cc",
    ),
}
XLA_HEADERS = ("xla/ffi/api/ffi.h", "tensorflow/compiler/tf2xla/xla_op_kernel.h")
# Beside those that TensorFlow names, for its headers of XLA.
XLA_INCLUDES = ("external/highwayhash", "external/farmhash_archive/src")

FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-pthread"]
# TensorFlow's headers hold checks for debugging, and those of 2.18 and 2.20 call functions
# that its libraries do not export.
FLAGS += ["-DNDEBUG"]
# Short rows are copied faster by the kernels' own loops than by calls of memcpy. The flag
# is GCC's alone.
GCC_FLAGS = ["-fno-tree-loop-distribute-patterns"]
ISAS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = "-mavx2 -mfma -mf16c"
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl " + ISAS["avx2"]
    ISAS["avx512_bf16"] = "-DSPATTN_AVX512_BF16 " + ISAS["avx512"]
else:
    FLAGS += ["-DSPATTN_ONLY_BASELINE"]

Found = collections.namedtuple("Found", "path why")
Compiler = collections.namedtuple("Compiler", "command version")
Recipe = collections.namedtuple("Recipe", "name tf_version objects link_flags")


def library(name, extra_flags=(), unfit=()):
    """The path of a library that fits, compiled now if there is none.

    Args:
      name: A key of `LIBRARIES`.
      extra_flags: More flags to compile and link with.
      unfit: Paths of libraries that are whole, but do not load. To compile one of them
        again would give the same library.

    Returns:
      str, or None where there is none and none can be compiled.

    Raises:
      RuntimeError: If the compiler fails: the command, and the end of what it said.
      OSError: If the cache cannot be written.
    """
    path, why = find(name, extra_flags, unfit)
    if path is None and why_no_compiling(name) is None:
        recipe = _recipe(name, extra_flags)
        target = _cached(recipe, cache.cache_folders()[-1])
        if target not in unfit:
            make = functools.partial(_compile, recipe)
            path, why = cache.make_once(target, make), "compiled"
    cache.say(f"{name}: {why}, {path}")
    return path


def build_core(extra_flags=()):
    """The path of the kernels behind `csrc/abi/core.h` alone: they need no TensorFlow."""
    return library("spattn_core", extra_flags)


def find(name, extra_flags=(), unfit=()):
    """`Found(path, why)`: what there is now; path None before it is compiled."""
    candidates = [] if extra_flags else [(prebuilt(name), "shipped in the package")]
    for folder in cache.cache_folders():
        pattern = _cached(_recipe(name, extra_flags), glob.escape(folder))
        candidates += [(path, "cached") for path in glob.glob(pattern)]
    for path, why in candidates:
        if path not in unfit and cache.is_intact(path):
            return Found(path, why)
    return Found(
        None, why_no_compiling(name) or "not compiled yet: the first call does it"
    )


def prebuilt(name):
    """Where a wheel puts the library; it serves all patch releases of a TF minor."""
    recipe = _recipe(name)
    minor = ".".join(recipe.tf_version.split(".")[:2])
    key = _fingerprint(recipe, minor)
    return os.path.join(PACKAGE, "prebuilt", f"{name}-tf{minor}-{key}.so")


def compiler():
    """`Compiler(command, version)`, or None where none runs."""
    try:
        command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
        said = subprocess.check_output([*command, "--version"]).decode(errors="replace")
    except (OSError, ValueError, subprocess.CalledProcessError):  # or an open quote
        return None
    return Compiler(command, said.split("\n")[0])


def why_no_compiling(name=None):
    """What keeps a library, or any, from being compiled: str, or None if nothing does."""
    if cache.is_set("SPARSE_ATTENTION_NO_JIT"):
        return "SPARSE_ATTENTION_NO_JIT is set" + _is_for_another(name)
    if os.name != "posix" or compiler() is None:
        command = os.environ.get("CXX") or "g++"
        return f"no compiler: {command} does not run" + _is_for_another(name)
    return _why_no_xla() if name == "attention_xla" else None


def _is_for_another(name):
    """str: for which TensorFlow a wheel brought the library, if not for this one."""
    prefix = os.path.join(PACKAGE, "prebuilt", f"{name}-tf")
    shipped = glob.glob(glob.escape(prefix) + "*.so")
    if not shipped or os.path.exists(prebuilt(name)):
        return ""
    minor = shipped[0][len(prefix) :].split("-")[0]
    return (
        f"; the wheel brought {name} for TensorFlow {minor}, and this is "
        f"{_tensorflow()[0]}"
    )


def _why_no_xla():
    import tensorflow as tf

    for header in XLA_HEADERS:
        if not os.path.isfile(os.path.join(_tensorflow_include(), header)):
            return f"TensorFlow {tf.__version__} ships no {header}"
    return None


# ---- recipe ----


def is_for_tensorflow(name):
    return any(source.startswith(("tf/", "xla/")) for source in LIBRARIES[name])


def _recipe(name, extra_flags=()):
    """What is compiled and linked, with which flags."""
    version, compile_flags, link_flags = "", [], []
    if is_for_tensorflow(name):
        version, compile_flags, link_flags = _tensorflow()
    if name == "attention_xla":
        include = _tensorflow_include()
        compile_flags += [f"-I{os.path.join(include, x)}" for x in XLA_INCLUDES]
        link_flags += ["-l:libtensorflow_cc.so.2"]
    flags = [*FLAGS, "-I" + CSRC, *extra_flags]
    objects = []  # [(source, flags)]
    for source in LIBRARIES[name]:
        if source.startswith(("tf/", "xla/")):
            objects.append((source, flags + compile_flags))
        elif source.endswith("kernels.cc"):
            for isa in ISAS:
                isa_flags = f"-std=c++17 -DSPATTN_ISA={isa} {ISAS[isa]}".split()
                objects.append((source, flags + isa_flags))
        else:
            objects.append((source, [*flags, "-std=c++17"]))
    return Recipe(name, version, objects, [*flags, *link_flags, "-ldl"])


def _tensorflow():
    import tensorflow as tf

    compile_flags = tf.sysconfig.get_compile_flags()
    if not any("-std=" in flag for flag in compile_flags):
        # TF before 2.10 names no standard and is C++14: an op library compiled as C++17
        # links, but does not load.
        compile_flags = [*compile_flags, "-std=c++14"]
    return tf.__version__, compile_flags, tf.sysconfig.get_link_flags()


def _tensorflow_include():
    import tensorflow as tf

    return tf.sysconfig.get_include()


def _fingerprint(recipe, tf_version):
    """str: a hash of all that makes the library, save the version of the compiler."""
    parts = [sparse_attention.__version__, sys.platform, platform.machine(), tf_version]
    parts += GCC_FLAGS
    for source, flags in [*recipe.objects, ("link", recipe.link_flags)]:
        parts.append(source)  # where TensorFlow lies does not matter
        parts += [flag for flag in flags if not flag.startswith(("-I", "-L"))]
    compiled = {source for source, _ in recipe.objects}
    for path in sorted(glob.glob(os.path.join(CSRC, "**", "*.*"), recursive=True)):
        source = os.path.relpath(path, CSRC)
        if source in compiled or source.endswith(".h"):
            with open(path, "rb") as file:
                parts += [source, hashlib.sha256(file.read()).hexdigest()]
    return cache.hash_of(parts)[:16]


def _cached(recipe, folder):
    """With no compiler this is a pattern: whichever one built it will do."""
    key = _fingerprint(recipe, recipe.tf_version)
    by = compiler()
    by = by and cache.hash_of([by.version, *by.command[1:]])[:8]
    return os.path.join(folder, f"{key}-{by or '*'}", recipe.name + ".so")


# ---- build ----


def _compile(recipe, work, built):
    command, version = compiler()
    if "clang" not in version:
        command = [*command, *GCC_FLAGS]
    compiles, objects = [], []
    for source, flags in recipe.objects:
        objects.append(os.path.join(work, f"{len(objects)}.o"))
        source = os.path.join(CSRC, *source.split("/"))
        compiles.append([*command, *flags, "-c", source, "-o", objects[-1]])
    link = [*command, "-shared", "-o", built, *objects, *recipe.link_flags]
    cache.say("\n".join(" ".join(line) for line in [*compiles, link]))
    target = f" for TensorFlow {recipe.tf_version}" if recipe.tf_version else ""
    with cache.progress(f"{recipe.name}{target} with {version}"):
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda line: _run(line, work), compiles))
        _run(link, work)
        if not os.path.isfile(built):
            raise RuntimeError(f"{version} wrote no library: {' '.join(link)}")


def _run(command, work):
    environment = dict(os.environ, TMPDIR=work)  # so that nothing is left elsewhere
    ran = subprocess.run(
        command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=environment
    )
    if ran.returncode != 0:
        said = ran.stdout.decode(errors="replace").rstrip().split("\n")
        raise RuntimeError(
            f"the compiler ended with status {ran.returncode}, expected 0:\n"
            + "\n".join([" ".join(command), *said[-20:]])
        )
