"""How fast sparse attention is on this CPU, beside what else its users could run.

    python benchmarks/cpu.py --torch-python ~/torch/bin/python   # an hour
    python benchmarks/cpu.py --quick                             # a minute

All contenders get the same inputs and number of threads, and their results are checked
against ours first. Then they are timed in turn, round after round, so that a machine
that speeds up or slows down does it to everybody: ratios say more than times.

Prints tables, writes a report to `benchmarks/results/`, and with `--plot` draws it.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import sys
import time
from collections import namedtuple

import numpy as np
import report as reports
from cpu_worker import Worker

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

HERE = os.path.dirname(os.path.abspath(__file__))

# ---- what is measured ----

MODES = ("all", "local", "strided", "fixed")
DTYPES = ("float32", "bfloat16")
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
TABLE_LENGTH = 4096  # of the summary, of scaling, and of everybody's memory
SHAPE = dict(batch=1, heads=4, head_dim=64, local_attn_ctx=128, block_size=32)

Case = namedtuple("Case", ["mode", "dtype", "q_len", *SHAPE])

# `longest`: the q_len up to which it runs, in 1,024 positions, by MODES. Beyond, a run
# would take minutes or the machine's memory. 0: not at all.
Contender = namedtuple("Contender", "name label framework is_trainable longest")
CONTENDERS = (
    Contender("fused", "ours", "tensorflow", True, (32, 64, 64, 64)),
    Contender("three_op", "ours, three ops", "tensorflow", True, (8, 64, 64, 16)),
    Contender("dense", "TF dense", "tensorflow", True, (8, 8, 8, 8)),
    Contender("dense_xla", "TF dense, XLA", "tensorflow", True, (8, 8, 8, 8)),
    Contender("gather", "TF gather", "tensorflow", True, (0, 64, 64, 16)),
    Contender("gather_xla", "TF gather, XLA", "tensorflow", True, (0, 64, 64, 16)),
    Contender("sdpa", "PyTorch SDPA", "torch", True, (32, 8, 64, 8)),
    Contender("flex", "FlexAttention", "torch", False, (16, 16, 64, 16)),
    Contender("flex_chunks", "FlexAttention, chunks", "torch", False, (0, 0, 16, 0)),
)
OURS = CONTENDERS[0]
MATMUL, MATMUL_FLOPS = "matmul", 2 * 2048**3

# Largest difference from our result, relative to its largest element. In bfloat16 each
# rounds scores, weights and sums of its own choice.
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}
ROUNDED_INSIDE = ("three_op",)  # to bfloat16, whatever the inputs

LONG = 60  # seconds after which three rounds are enough


def useful_flops(case, is_training):
    """FLOPs of the pairs that attend, whatever a contender computes beside them.

    Two products forward; five more backward, as the scores are computed again.
    """
    i, window = np.arange(case.q_len), case.local_attn_ctx
    keys = {
        "all": i + 1,
        "local": np.minimum(i + 1, window),
        "strided": i // window + 1,
        "fixed": i % window + 1 + i // window * case.block_size,
    }[case.mode]
    products = 7 if is_training else 2
    return 2 * products * case.batch * case.heads * case.head_dim * int(keys.sum())


# ---- measuring ----


class Bench:
    """Processes that compute, and how long to let them."""

    def __init__(self, args):
        self.rounds, self.seconds = args.rounds, args.seconds
        self.threads = args.threads
        self._pythons = {"tensorflow": sys.executable}
        if args.torch_python:
            self._pythons["torch"] = args.torch_python
        self.workers = {f: self.start(f, self.threads) for f in self._pythons}
        self._by_threads = {}

    def start(self, framework, threads):
        script = os.path.join(HERE, f"cpu_{framework}.py")
        return Worker(self._pythons[framework], script, threads)

    def contenders(self, case, is_training):
        """Those that take part, ours first."""
        return [
            c
            for c in CONTENDERS
            if c.framework in self.workers
            and c.name in self.workers[c.framework].contenders
            and case.q_len <= 1024 * c.longest[MODES.index(case.mode)]
            and (c.is_trainable or not is_training)
        ]

    def speed(self, case, is_training):
        """Rows of all contenders, with what they reach of the matmul rate."""
        entrants = {
            c.label: (self.workers[c.framework], c.name)
            for c in self.contenders(case, is_training)
        }
        entrants[MATMUL] = self.workers["tensorflow"], MATMUL
        rows = self._measure(case, is_training, entrants)
        matmul = rows.pop(MATMUL)
        flops = useful_flops(case, is_training)
        for row in rows.values():
            if "ms" in row:
                matmuls = matmul["times_first"] / row["times_first"]
                row["gflops"] = flops / row["ms"] / 1e6
                row["share_of_matmul"] = flops / MATMUL_FLOPS * matmuls
        return rows

    def scaling(self, case, is_training):
        """Rows of ours with one thread and with two."""
        if not self._by_threads:
            self._by_threads = {n: self.start(OURS.framework, n) for n in (1, 2)}
        entrants = {
            f"{OURS.label}, threads: {n}": (worker, OURS.name)
            for n, worker in self._by_threads.items()
        }
        rows = self._measure(case, is_training, entrants)
        for row in rows.values():
            if "ms" in row:
                row["speedup"] = 1 / row["times_first"]
        return rows

    def memory(self, case, is_training):
        """Rows with the MB of one call beside its inputs and results."""
        rows = {}
        takes_part = self.contenders(case, is_training)
        for c in takes_part if case.q_len == TABLE_LENGTH else [OURS]:
            worker = self.start(c.framework, self.threads)
            rows[c.label] = worker.ask(
                "peak_memory", name=c.name, case=case._asdict(), is_training=is_training
            )
            worker.close()
        return rows

    def _measure(self, case, is_training, entrants):
        """Checks that entrants compute the same, then times them in turn.

        Args:
          case: `Case`.
          is_training: Whether to run the backward pass too.
          entrants: `{label: (worker, name)}`; others are compared to the first.

        Returns:
          `{label: row}`. A row is a dict: ms (median), ms_low, ms_high (10th and 90th
          percentile), calls, times_first (its time relative to the first's, the median
          over rounds), difference (from the first's results); or "error" alone.
        """
        rows, expected = {}, None
        for label, (worker, name) in entrants.items():
            row = worker.ask(
                "prepare", name=name, case=case._asdict(), is_training=is_training
            )
            if "results" in row:
                results = read_results(row.pop("results"))
                expected = expected or results
                if name != MATMUL:
                    row = check(results, expected, name, case.dtype)
            rows[label] = row
        turns = {label: [] for label, row in rows.items() if "error" not in row}
        started = time.time()
        for turn in range(self.rounds):
            if turn >= 3 and time.time() - started > LONG:
                break
            for label, times in turns.items():
                worker, name = entrants[label]
                answer = worker.ask("time", name=name, seconds=self.seconds)
                times.append(answer["ms"])
        for worker, _ in entrants.values():
            worker.ask("forget")
        medians = {x: np.array([np.median(ms) for ms in turns[x]]) for x in turns}
        first = medians.get(next(iter(entrants)), np.nan)
        for label, times in turns.items():
            calls = np.concatenate(times)
            low, median, high = np.percentile(calls, [10, 50, 90])
            rows[label].update(ms=median, ms_low=low, ms_high=high, calls=len(calls))
            rows[label].update(times_first=np.median(medians[label] / first))
        return rows


def read_results(path):
    with np.load(path) as arrays:
        results = list(arrays.values())
    os.remove(path)
    return results


def check(results, expected, name, dtype):
    """A row: the largest difference, relative to the largest element expected."""
    pairs = zip(results, expected)
    largest = [np.max(np.abs(x - y)) / np.max(np.abs(y)) for x, y in pairs]
    difference = float(np.max(largest))  # NaN if any is
    tolerance = TOLERANCE["bfloat16" if name in ROUNDED_INSIDE else dtype]
    row = {"difference": difference}
    if not difference <= tolerance:
        bound = f"expected {tolerance:.1e} at most"
        row["error"] = f"results differ by {difference:.1e}, {bound}"
    return row


# ---- running ----


def main():
    args = parse_args()
    bench = Bench(args)
    report = {"machine": machine(bench), "shape": SHAPE}
    report.update(speed=[], scaling=[], memory=[])
    say("\n".join(f"{key}: {value}" for key, value in report["machine"].items()))
    for section, case, is_training in progress(jobs(args, bench)):
        phase = "fwd+bwd" if is_training else "fwd"
        for label, row in getattr(bench, section)(case, is_training).items():
            row = dict(case._asdict(), phase=phase, contender=label, **row)
            report[section].append(row)
            say(reports.as_text(row))
        save(report, args)
    say(reports.summary(report, table_length(args)))
    if args.plot:
        reports.draw(report, args.plot)
    rows = report["speed"] + report["scaling"] + report["memory"]
    return int(any(map(is_wrong, rows)))


def is_wrong(row):
    """Whether ours failed or results differ; others may have their limits."""
    return "error" in row and ("difference" in row or row["contender"] == OURS.label)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a minute, for a first look and for CI")
    add("--torch-python", help="an interpreter with PyTorch, for its contenders")
    add("--threads", type=int, default=os.cpu_count(), help="for everybody")
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    add("--lengths", nargs="+", type=int, help="q_len, multiples of 128")
    add("--rounds", type=int, help="turns of everybody")
    add("--seconds", type=float, help="of a turn, at least")
    add("--results", default=os.path.join(HERE, "results"), help="folder of reports")
    add("--plot", help="picture to draw, like docs/cpu.png")
    args = parser.parse_args()
    args.lengths = args.lengths or ([256] if args.quick else LENGTHS)
    args.rounds = args.rounds or (2 if args.quick else 9)
    args.seconds = args.seconds or (0.01 if args.quick else 0.2)
    window = SHAPE["local_attn_ctx"]
    for q_len in args.lengths:
        if q_len <= 0 or q_len % window:
            parser.error(f"--lengths must be multiples of {window}, got {q_len}")
    return args


def jobs(args, bench):
    """[(method of `Bench`, case, is_training)]"""
    cases = [
        Case(mode, dtype, q_len, **SHAPE)
        for q_len in args.lengths
        for dtype in args.dtypes
        for mode in args.modes
    ]
    phases = (False, True)
    at_table = [c for c in cases if c.q_len == table_length(args)]
    ends = [
        c
        for c in cases
        if c.q_len in (table_length(args), max(args.lengths))
        and c.dtype == args.dtypes[0]
    ]
    if args.quick:
        at_table, ends = at_table[:1], ends[:1]
    return [
        *(("speed", c, p) for c in cases for p in phases if bench.contenders(c, p)),
        *(("memory", c, True) for c in ends),
        *(("scaling", c, p) for c in at_table for p in phases),
    ]


def table_length(args):
    return TABLE_LENGTH if TABLE_LENGTH in args.lengths else min(args.lengths)


def progress(items):
    """Yields items, with a bar on stderr."""
    if tqdm:
        yield from tqdm(items, unit="case", smoothing=0, disable=None)
        return
    for i, item in enumerate(items):
        print(f"{i}/{len(items)}", end="\r", file=sys.stderr, flush=True)
        yield item


def say(text):
    """Prints a line of the report, above the bar."""
    tqdm.write(text) if tqdm else print(text, flush=True)


def machine(bench):
    """What the figures are of."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        cpu = re.search(r"model name\s*: (.*)", file.read()).group(1)
    return dict(
        cpu=cpu,
        cores=os.cpu_count(),
        threads=bench.threads,
        frameworks=[worker.version for worker in bench.workers.values()],
        date=datetime.date.today().isoformat(),
        commit=reports.commit(),
    )


def save(report, args):
    """Writes the report so far: hours are not lost to an interruption."""
    about = report["machine"]
    lengths = sorted({str(min(args.lengths)), str(max(args.lengths))}, key=int)
    name = reports.file_name(
        "cpu", *(about[word] for word in ("cpu", "date", "commit")), *lengths
    )
    os.makedirs(args.results, exist_ok=True)
    path = os.path.join(args.results, name)
    with open(path, "w") as file:
        json.dump(report, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
