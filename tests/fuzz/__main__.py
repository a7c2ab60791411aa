"""Calls the package's ops with what somebody may have crafted, and counts what comes.

python -m tests.fuzz --calls 100000 --jobs 2
python -m tests.fuzz --seed 14952              # one call, which is printed
python -m tests.fuzz --rewrite 5 --sanitized
"""

import argparse
import collections
import os
import subprocess
import sys

ASAN_OPTIONS = {
    "detect_leaks": 0,  # Python's
    "max_allocation_size_mb": 3072,
    "allocator_may_return_null": 1,  # as malloc does; TensorFlow raises an error then
}


def environment(sanitized):
    """dict: what must be set before a process starts."""
    changes = {
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",  # which malloc does not fill
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "OPENBLAS_NUM_THREADS": "1",
    }
    if sanitized:
        compiler = os.environ.get("CXX", "g++").split()
        paths = [
            subprocess.check_output([*compiler, f"-print-file-name={name}.so"])
            for name in ("libasan", "libubsan")
        ]
        changes["LD_PRELOAD"] = b" ".join(paths).decode().replace("\n", "")
        changes["ASAN_OPTIONS"] = ":".join(f"{k}={v}" for k, v in ASAN_OPTIONS.items())
        changes["PYTHONMALLOC"] = "malloc"
    return changes


def build_sanitized():
    """Has the op libraries compiled with the sanitizers."""
    from sparse_attention.native import libraries
    from tests import sanitized  # noqa: F401 - it adds its flags

    # TensorFlow's headers are no constant expressions with some, and its libraries name
    # no types for another.
    without = "null,nonnull-attribute,returns-nonnull-attribute,vptr"
    libraries.FLAGS += ["-fno-sanitize=" + without]


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--calls", type=int, help="default: 1, or none with --rewrite")
    add("--seed", type=int, default=0, help="of the first call; the next has seed + 1")
    add("--rewrite", type=float, metavar="SECONDS", help="rewrite each plan so long")
    add("--jobs", type=int, default=1, help="processes that call")
    add("--sanitized", action="store_true", help="with AddressSanitizer")
    options = parser.parse_args()
    changes = environment(options.sanitized)
    if any(os.environ.get(name) != value for name, value in changes.items()):
        os.environ.update(changes)
        os.execv(sys.executable, [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]])
    if options.sanitized:
        build_sanitized()

    import tensorflow as tf

    import sparse_attention as sa

    from . import calls, workers

    sa.load_ops(blocksparse_ops=True)
    count = options.calls
    if count is None:
        count = 0 if options.rewrite else 1
    seeds = range(options.seed, options.seed + count)
    tasks = [workers.call_task(seed) for seed in seeds]
    if options.rewrite:
        keys = calls.rewritten()
        tasks += [workers.rewriting_task(key, options.rewrite) for key in keys]
    by_kind, by_detail = collections.Counter(), collections.Counter()
    for task, result in workers.run_tasks(tasks, options.jobs):
        is_call, is_failure = task.label in seeds, result.kind in workers.FAILURES
        by_kind[result.kind] += 1
        if is_failure or not is_call or count == 1:
            print(f"{result.kind}: {result.detail}", flush=True)
            print(calls.call_of(task.label) if is_call else task.label, flush=True)
        if is_failure and is_call:
            print(f"again: python -m tests.fuzz --seed {task.label}\n", flush=True)
        if is_call and not is_failure:
            by_detail[result] += 1
    how = ", sanitized" * options.sanitized
    print(
        f"TensorFlow {tf.__version__}{how}, {len(tasks)} tasks from seed {seeds.start}"
    )
    for kind in ("success", "error", *workers.FAILURES):
        print(f"{by_kind[kind]:9} {kind}")
        for result, number in sorted(by_detail.items()):
            if result.kind == kind:
                print(f"{number:13} {result.detail}")
    return int(any(by_kind[kind] for kind in workers.FAILURES))


if __name__ == "__main__":
    sys.exit(main())
