"""How fast sparse attention is on this GPU, beside what else its users could run.

    python benchmarks/gpu.py --plot docs/gpu.png      # ten minutes
    python benchmarks/gpu.py --parts kernels --lengths 16384

Part `kernels` runs the kernels through the C ABI on PyTorch tensors, beside cuDNN,
FlashAttention-2 and FlexAttention; part `tensorflow` runs the op beside TensorFlow's dense
attention, plain and compiled by XLA. Each is a process of its own: `gpu_kernels.py` and
`gpu_tensorflow.py` say how they measure.

Prints lines and tables, writes a report to `benchmarks/results/`, and with `--plot` draws it.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys

import report as reports
from cpu import HERE, MODES, Case, useful_flops

# batch, q_len, heads, head_dim, local_attn_ctx
WIDE, LONG = (4, 16384, 8, 128, 128), (1, 65536, 8, 64, 256)
# Of the picture: as many tokens at every length.
CURVE = [(65536 // n, n, 16, 64, 128) for n in (4096, 16384, 65536)]
SHAPES = {
    "kernels": [*CURVE, WIDE, LONG],
    "tensorflow": [(4, 4096, 16, 64, 128), (4, 16384, 16, 64, 128), LONG],
}
SHAPE = dict(
    batch="65,536 / length", heads=16, head_dim=64, local_attn_ctx=128, block_size=32
)


def cases(part, modes, lengths):
    """Lists of `Case`: those of a list have their tensors in common."""
    return [
        [
            Case(mode, "bfloat16", q_len, batch, heads, dim, window, block_size=32)
            for mode in modes
        ]
        for batch, q_len, heads, dim, window in SHAPES[part]
        if q_len in lengths
    ]


def emit(row):
    """Hands a line of the report to `gpu.py`."""
    print(json.dumps(row), flush=True)


def parse_args(parts=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    if parts:
        add("--parts", nargs="+", choices=parts, default=parts)
        add(
            "--results", default=os.path.join(HERE, "results"), help="folder of reports"
        )
        add("--plot", help="picture to draw, like docs/gpu.png")
        add("--commit", help="of the sources, where there is no git")
    lengths = sorted({shape[1] for shapes in SHAPES.values() for shape in shapes})
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add("--lengths", nargs="+", type=int, choices=lengths, default=lengths)
    return parser.parse_args()


def main():
    args = parse_args(list(SHAPES))
    machine = {"date": datetime.date.today().isoformat(), "frameworks": []}
    report = {"machine": machine, "shape": SHAPE, "speed": []}
    machine["commit"] = args.commit or reports.commit()
    status = 0
    for part in args.parts:
        command = [sys.executable, os.path.join(HERE, f"gpu_{part}.py")]
        command += ["--modes", *args.modes, "--lengths", *map(str, args.lengths)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if not line.startswith("{"):
                print(line, end="", flush=True)
                continue
            row = json.loads(line)
            if "framework" in row:
                machine["frameworks"].append(row.pop("framework"))
                machine.update(row)
                print(row, flush=True)
                continue
            if "ms" in row:
                complete(row, machine, report["speed"])
            report["speed"].append(row)
            print(reports.as_text(row), flush=True)
            save(report, args)
        status |= process.wait()
    print(reports.shapes_summary(report))
    if args.plot:
        reports.draw(report, args.plot)
    return status


def save(report, args):
    """Writes what came so far."""
    words = (report["machine"][word] for word in ("gpu", "date", "commit"))
    os.makedirs(args.results, exist_ok=True)
    name = reports.file_name("gpu", *words, *args.parts)
    with open(os.path.join(args.results, name), "w") as file:
        json.dump(report, file, indent=1)


def complete(row, machine, earlier):
    """Adds what follows from a row's time: rates, and how it compares to ours."""
    case = Case(**{name: row[name] for name in Case._fields})
    flops = useful_flops(case, row["phase"] == "fwd+bwd")
    row["gflops"] = flops / row["ms"] / 1e6
    row["share_of_matmul"] = row["gflops"] / machine["matmul_tflops"] / 1e3
    same = [r for r in earlier if all(r[n] == row[n] for n in (*Case._fields, "phase"))]
    ours = next((r for r in same if r["contender"] == reports.OURS), row)
    row["times_first"] = row["ms"] / ours["ms"]


if __name__ == "__main__":
    sys.exit(main())
