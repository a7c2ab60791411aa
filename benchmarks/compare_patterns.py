"""What each pattern learns in equal steps and in equal seconds, and from how much context.

    python benchmarks/compare_patterns.py --out compare            on one or more GPUs
    python benchmarks/compare_patterns.py --out compare --report   the report alone

Each pattern is trained by examples/train_lm.py. First a short run by itself on a GPU finds
the seconds of a step. Then each is trained for `--steps` steps, and for as many as the
slowest one takes `--steps` in, at the learning rates of so many; these runs share the GPUs,
`--together` on each, since what they learn does not depend on how long they take. Last comes
the loss of the test data by position, as examples/loss_by_position.py has it. All are whole
commands of the examples, whose output is kept beside their folder, and go on where they were
stopped. In the report a curve's seconds are those that so many steps take alone.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
PATTERNS = ["dense", "fixed", "strided", "merged"]
SPEED = {"steps": 80, "steps_per_epoch": 20}  # of the first, short run


class Comparison:
    """The runs of all patterns, in a folder, on some GPUs."""

    def __init__(self, options, more):
        self.out, self.options, self.more = options.out, options, more

    def run(self):
        patterns = self.options.patterns
        rates = self.on_gpus(1, self.speed, [(pattern,) for pattern in patterns])
        seconds_a_step = dict(zip(patterns, rates))
        write(self.out / "speed.json", seconds_a_step)
        print(seconds_a_step, flush=True)
        runs = steps_of_runs(seconds_a_step, self.options)
        runs.sort(key=lambda run: -run[1] * seconds_a_step[run[0]])
        self.on_gpus(self.options.together, self.train_and_evaluate, runs)

    def on_gpus(self, together, function, calls):
        """[function(gpu, *call)]: so many at once on each GPU."""
        free = queue.Queue()
        for gpu in self.options.gpus * together:
            free.put(gpu)

        def with_gpu(call):
            gpu = free.get()
            try:
                return function(gpu, *call)
            finally:
                free.put(gpu)

        with concurrent.futures.ThreadPoolExecutor(free.qsize()) as pool:
            return list(pool.map(with_gpu, calls))

    def speed(self, gpu, pattern):
        """The median over the epochs but the first, which traces and compiles."""
        folder = self.train(gpu, pattern, "speed", **SPEED, eval_batches=1)
        curve = json.loads((folder / "curve.json").read_text())
        return statistics.median(
            (b["seconds"] - a["seconds"]) / (b["step"] - a["step"])
            for a, b in zip(curve, curve[1:])
        )

    def train_and_evaluate(self, gpu, pattern, steps):
        epoch = self.options.steps_per_epoch
        folder = self.train(gpu, pattern, steps, steps=steps, steps_per_epoch=epoch)
        output = folder.parent / f"{pattern}_positions.json"
        data = ["--data", self.options.data] if self.options.data else []
        example(gpu, output, "loss_by_position.py", folder, "--output", output, *data)

    def train(self, gpu, pattern, name, **settings):
        """Runs the example to the end; returns the folder of the run."""
        output = self.out / str(name)
        arguments = ["--preset", self.options.preset, "--attention", pattern]
        if self.options.data:
            arguments += ["--data", self.options.data]
        for setting, value in settings.items():
            arguments += ["--" + setting.replace("_", "-"), value]
        arguments += ["--output", output, *self.more]
        example(gpu, output / pattern, "train_lm.py", *arguments)
        return output / pattern


def steps_of_runs(seconds_a_step, options):
    """[(pattern, steps)]: equal steps and equal seconds, in whole epochs; each run once."""
    epoch, slowest = options.steps_per_epoch, max(seconds_a_step.values())
    runs = {(pattern, options.steps) for pattern in seconds_a_step}
    for pattern, seconds in seconds_a_step.items():
        epochs = round(options.steps * slowest / seconds / epoch)
        runs.add((pattern, epochs * epoch))
    return sorted(runs)


def example(gpu, log, name, *arguments):
    """Runs a script of the examples on a GPU, with its output in a file beside `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, EXAMPLES / name, *arguments]
    with open(log.with_suffix(".log"), "a") as output:
        subprocess.run(
            [str(word) for word in command],
            check=True,
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": gpu,
                "TF_FORCE_GPU_ALLOW_GROWTH": "true",  # or the first takes it all
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def mean(by_position):
    """Bits per byte over all positions."""
    sizes = [row["to"] - row["from"] for row in by_position]
    bits = [row["bits_per_byte"] for row in by_position]
    return sum(size * x for size, x in zip(sizes, bits)) / sum(sizes)


def report(out):
    """What the folder holds, in one dictionary."""
    rows, head = [], {}
    seconds_a_step = json.loads((out / "speed.json").read_text())
    for path in sorted(out.glob("*/*_positions.json")):
        ((folder, by_position),) = json.loads(path.read_text()).items()
        folder = pathlib.Path(folder)
        config = json.loads((folder / "config.json").read_text())
        curve = json.loads((folder / "curve.json").read_text())
        pattern, steps = folder.name, config["training"].pop("steps")
        head = {**config, "model": {**config["model"], "attention": None}}
        for row in curve:
            row["seconds"] = round(row["step"] * seconds_a_step[pattern], 3)
        rows.append(
            {
                "pattern": pattern,
                "steps": steps,
                "seconds_a_step": seconds_a_step[pattern],
                "test": round(mean(by_position), 4),
                "by_position": by_position,
                "curve": curve,
            }
        )
    return {"config": head, "rows": rows}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder")
    parser.add_argument("--patterns", nargs="*", choices=PATTERNS, default=PATTERNS)
    parser.add_argument("--preset", choices=["cpu", "gpu"], default="gpu")
    parser.add_argument("--data", type=pathlib.Path, help="as of train_lm.py")
    parser.add_argument("--steps", type=int, default=700, help="of the slowest")
    parser.add_argument("--steps-per-epoch", type=int, default=100)
    parser.add_argument("--gpus", nargs="*", default=["0"], help="their numbers")
    parser.add_argument("--together", type=int, default=4, help="runs on a GPU")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options, more = parser.parse_known_args(arguments)
    if not options.report:
        Comparison(options, more).run()
    found = report(options.out)
    write(options.out / "report.json", found)
    for row in found["rows"]:
        print({k: v for k, v in row.items() if k not in ("curve", "by_position")})


if __name__ == "__main__":
    main()
