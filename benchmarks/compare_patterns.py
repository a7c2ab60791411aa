"""What each pattern learns in equal steps and in equal seconds, and from how much context.

    python benchmarks/compare_patterns.py --out compare            on a GPU, 20 minutes
    python benchmarks/compare_patterns.py --out compare --report   the report alone

Each pattern is trained by examples/train_lm.py twice: for `--steps` steps, and for as many
as it takes `--seconds` for by its time of a step in the first run, at the learning rates of
so many. Both are whole commands of the example, whose output is shown, and go on where they
were stopped. The report has both curves, and the bits per byte of the test data by position,
as examples/loss_by_position.py has them. Patterns may be run by several processes, each on
a GPU of its own, with one folder `--out`; `--report` then joins what they left.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
PATTERNS = ["dense", "fixed", "strided", "merged"]


def train(options, pattern, run, steps, more):
    """Runs the example to the end; returns the folder of the run."""
    output = options.out / run
    command = [sys.executable, EXAMPLES / "train_lm.py", "--preset", options.preset]
    command += ["--attention", pattern, "--output", output, "--steps", steps]
    subprocess.run([*map(str, command), *more], check=True)
    return output / pattern


def seconds_a_step(folder):
    """The median over the epochs but the first, in which the step is traced and compiled."""
    curve = json.loads((folder / "curve.json").read_text())
    return statistics.median(
        (b["seconds"] - a["seconds"]) / (b["step"] - a["step"])
        for a, b in zip(curve, curve[1:])
    )


def compare(options, pattern, more):
    """Both runs of a pattern, and then the loss by position of both."""
    epoch = options.steps_per_epoch
    more = ["--steps-per-epoch", str(epoch), *more]
    first = train(options, pattern, "steps", options.steps, more)
    epochs = max(1, round(options.seconds / seconds_a_step(first) / epoch))
    second = train(options, pattern, "seconds", epochs * epoch, more)
    positions = options.out / f"positions_{pattern}.json"
    command = [sys.executable, EXAMPLES / "loss_by_position.py", first, second]
    command += ["--output", positions]
    if "--data" in more:
        command += ["--data", more[more.index("--data") + 1]]
    subprocess.run([*map(str, command)], check=True)


def mean(by_position):
    """Bits per byte over all positions."""
    sizes = [row["to"] - row["from"] for row in by_position]
    bits = [row["bits_per_byte"] for row in by_position]
    return sum(size * x for size, x in zip(sizes, bits)) / sum(sizes)


def report(out):
    """What the folder holds, in one dictionary."""
    rows, head = [], {}
    for path in sorted(out.glob("positions_*.json")):
        for folder, by_position in json.loads(path.read_text()).items():
            folder = pathlib.Path(folder)
            config = json.loads((folder / "config.json").read_text())
            curve = json.loads((folder / "curve.json").read_text())
            del config["training"]["steps"]  # each run has its own, as its pattern
            head = {**config, "model": {**config["model"], "attention": None}}
            rows.append(
                {
                    "pattern": folder.name,
                    "equal": folder.parent.name,
                    "steps": curve[-1]["step"],
                    "seconds_a_step": round(seconds_a_step(folder), 5),
                    "test": round(mean(by_position), 4),
                    "by_position": by_position,
                    "curve": curve,
                }
            )
    return {"config": head, "rows": rows}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder")
    parser.add_argument("--patterns", nargs="*", choices=PATTERNS, default=PATTERNS)
    parser.add_argument("--preset", choices=["cpu", "gpu"], default="gpu")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--steps-per-epoch", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--report", action="store_true", help="train nothing")
    options, more = parser.parse_known_args(arguments)
    if not options.report:
        for pattern in options.patterns:
            compare(options, pattern, more)
    found = report(options.out)
    (options.out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    for row in found["rows"]:
        print({k: v for k, v in row.items() if k not in ("curve", "by_position")})


if __name__ == "__main__":
    main()
