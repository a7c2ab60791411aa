"""Runs the tests on each TensorFlow, Keras, Python, NumPy and compiler that we support.

    python tools/version_matrix.py run                    # `make test-matrix`: all of them
    python tools/version_matrix.py run 2.15 keras-3.12    # some
    python tools/version_matrix.py write                  # docs/versions.md from the results

Each environment is made once, in .venv-matrix/. A result replaces the one of the same name
in benchmarks/results/versions.json, from which the table of docs/versions.md is written.
What cannot be had on a machine, a Python or a compiler, is a result too: it was not run.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree
from typing import NamedTuple, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENTS = os.path.join(ROOT, ".venv-matrix")
RESULTS = os.path.join(ROOT, "benchmarks", "results", "versions.json")
PAGE = os.path.join(ROOT, "docs", "versions.md")
BEGIN, END = "<!-- written by tools/version_matrix.py -->", "<!-- until here -->"

# The op, the layer, SavedModels and recompute.
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in ("attention", "keras_layer", "saved_graphs", "recompute")
)
SMOKE = ("tests/versions",)  # needs TensorFlow 2
COMPILED = ("tests/test_attention.py", *SMOKE)
KERAS_3 = tuple(
    f"tests/test_{name}.py"
    for name in ("keras_layer", "keras_3", "attention_layers", "flash_attention")
)


class Cell(NamedTuple):
    """One environment, and what is run in it."""

    name: str
    python: str
    packages: Tuple[str, ...] = ()
    base: str = ""  # the name of a cell whose packages it sees
    compiler: str = ""  # a name on PATH, for CXX
    tests: Tuple[str, ...] = TESTS + SMOKE
    environment: Tuple[Tuple[str, str], ...] = ()


def _tensorflow(version, python, *packages):
    return Cell(version, python, (f"tensorflow-cpu~={version}.0", *packages))


def _legacy(version, python):
    """Keras 2 beside a TensorFlow that brings Keras 3."""
    packages = f"tensorflow-cpu~={version}.0", f"tf_keras~={version}.0"
    switch = (("TF_USE_LEGACY_KERAS", "1"),)
    return Cell(f"tf_keras-{version}", python, packages, environment=switch)


TF1 = "tensorflow==1.15.5", "protobuf==3.20.3", "scipy==1.7.3"
CELLS = [
    Cell("1.15-numpy-1.17", "3.7", (*TF1, "numpy==1.17.5"), tests=TESTS),
    Cell("1.15", "3.7", (*TF1, "numpy==1.18.5"), tests=TESTS),
    _tensorflow("2.12", "3.8"),
    _tensorflow("2.13", "3.9"),
    _tensorflow("2.14", "3.9"),
    _tensorflow("2.15", "3.10"),
    _tensorflow("2.16", "3.12"),
    _tensorflow("2.17", "3.11"),
    _tensorflow("2.18", "3.10"),
    _tensorflow("2.19", "3.12"),
    _tensorflow("2.20", "3.11"),
    _tensorflow("2.21", "3.13"),
    _legacy("2.16", "3.9"),
    _legacy("2.18", "3.11"),
    *(
        Cell(f"keras-{x}", "3.13", (f"keras~={x}.0",), "2.21", tests=KERAS_3)
        for x in ("3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
    ),
    *(
        Cell(x, "3.13", base="2.21", compiler=x, tests=COMPILED)
        for x in (
            *("g++-9", "g++-10", "g++-11", "g++-12", "g++-13", "g++-14"),
            *("clang++-14", "clang++-19"),
        )
    ),
]

# Printed by each environment: what it has, and that the compiled op is what ran.
FACTS = """
import json, os, platform
import numpy, tensorflow
from sparse_attention.keras.backend import VERSION
from sparse_attention.native import libraries, loader
if VERSION == "2":  # it does not say which
    from importlib import metadata
    VERSION = metadata.version("tf_keras" if "TF_USE_LEGACY_KERAS" in os.environ else "keras")
print(json.dumps({
    "python": platform.python_version(), "numpy": numpy.__version__,
    "tensorflow": tensorflow.__version__, "keras": VERSION,
    "compiler": libraries.compiler().version, "why_not": loader.why_not("attention_ops"),
}))
"""


class NotRun(Exception):
    """What cannot be had here, so that a cell's tests were not begun."""


_making = threading.RLock()  # held to make an environment, which others may see


def environment_of(cell):
    """The path of the cell's Python; its environment is made if it is not there."""
    with _making:
        return _environment_of(cell)


def _environment_of(cell):
    folder = os.path.join(ENVIRONMENTS, cell.name)
    python = os.path.join(folder, "bin", "python")
    if os.path.exists(os.path.join(folder, "ready")):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    find = os.path.join(ROOT, "tools", "find_python.sh")
    found = subprocess.run([find, cell.python], stdout=subprocess.PIPE, text=True)
    if found.returncode:
        raise NotRun(f"no Python {cell.python}")
    subprocess.check_call([found.stdout.strip(), "-m", "venv", folder])
    requirements = [*cell.packages]
    if cell.base:
        base = environment_of(next(c for c in CELLS if c.name == cell.base))
        with open(os.path.join(_packages(python), "base.pth"), "w") as file:
            file.write(_packages(base))
        options = ["--no-deps"]
    else:
        options = ["-r", os.path.join(ROOT, "requirements", "matrix.txt")]
    if cell.packages or not cell.base:
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.check_call([*pip, *options, *requirements])
    with open(os.path.join(folder, "ready"), "w"):
        return python


def _packages(python):
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.check_output([python, "-c", code], text=True).strip()


def result_of(cell):
    """What goes into the results: a dict."""
    row = {"name": cell.name, "date": datetime.date.today().isoformat()}
    row["commit"] = _git("describe", "--always", "--dirty")
    try:
        variables = dict(os.environ, PYTHONPATH=ROOT, TF_CPP_MIN_LOG_LEVEL="2")
        variables.update(cell.environment)
        if cell.compiler:
            if shutil.which(cell.compiler) is None:
                raise NotRun(f"no {cell.compiler}")
            variables["CXX"] = cell.compiler
        python = environment_of(cell)
        row.update(_tested(python, cell, variables))
    except NotRun as error:
        row["not_run"] = str(error)
    return row


def _git(*arguments):
    return subprocess.check_output(["git", "-C", ROOT, *arguments], text=True).strip()


def _tested(python, cell, variables):
    said = subprocess.check_output([python, "-c", FACTS], env=variables, text=True)
    row = json.loads(said.strip().split("\n")[-1])
    report = os.path.join(ENVIRONMENTS, cell.name, "report.xml")
    log = os.path.join(ENVIRONMENTS, cell.name, "log.txt")
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    with open(log, "w") as file:
        subprocess.run(
            [*command, f"--junitxml={report}", *cell.tests],
            **{"cwd": ROOT, "env": variables, "stdout": file, "stderr": file},
        )
    (suite,) = xml.etree.ElementTree.parse(report).getroot().iter("testsuite")
    count = {key: int(suite.get(key)) for key in ("tests", "failures", "errors")}
    failed, skipped = count["failures"] + count["errors"], int(suite.get("skipped"))
    row.update(tests=list(cell.tests), passed=count["tests"] - failed - skipped)
    row.update(failed=failed, skipped=skipped, seconds=round(float(suite.get("time"))))
    return row


def run(names, jobs):
    """Runs the cells of those names, all if there are none; whether none failed."""
    unknown = set(names) - {cell.name for cell in CELLS}
    if unknown:
        known = ", ".join(cell.name for cell in CELLS)
        raise SystemExit(f"there is no {', '.join(unknown)}, but there are {known}")
    cells = [cell for cell in CELLS if not names or cell.name in names]
    is_good = True
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for row in pool.map(result_of, cells):
            print(" | ".join(cells_of(row)), flush=True)
            save(row)
            is_good &= not row.get("failed") and row.get("why_not") is None
    return is_good


def load():
    """[dict]: the results, in the order of CELLS."""
    if not os.path.exists(RESULTS):
        return []
    with open(RESULTS) as file:
        rows = {row["name"]: row for row in json.load(file)}
    return [rows[cell.name] for cell in CELLS if cell.name in rows]


def save(row):
    rows = [r for r in load() if r["name"] != row["name"]] + [row]
    order = [cell.name for cell in CELLS]
    rows.sort(key=lambda r: order.index(r["name"]))
    with open(RESULTS, "w") as file:
        file.write(json.dumps(rows, indent=1) + "\n")


# ---- the table ----

COLUMNS = "run", "TensorFlow", "Keras", "Python", "NumPy", "compiler", "tests"


def cells_of(row):
    """[str]: a line of the table."""
    if "not_run" in row:
        return [row["name"], *["–"] * 5, f"not run: {row['not_run']}"]
    number = re.findall(r"\d+\.\d+\.\d+", row["compiler"])[-1]
    kind = "clang++" if "clang" in row["compiler"].lower() else "g++"
    told = [f"{row['passed']} passed"]
    told += [f"{row[key]} {key}" for key in ("failed", "skipped") if row[key]]
    if row["why_not"]:
        told.append(f"without the compiled op: {row['why_not']}")
    versions = [row[key] for key in ("tensorflow", "keras", "python", "numpy")]
    return [row["name"], *versions, f"{kind} {number}", ", ".join(told)]


def table(rows):
    """Markdown of the results; a cell that has none was not run."""
    found = {row["name"]: row for row in rows}
    for cell in CELLS:
        found.setdefault(cell.name, {"name": cell.name, "not_run": "no result yet"})
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [cells_of(found[cell.name]) for cell in CELLS]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page_with(text, rows):
    """The page's text with the table of the results in it."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["run", "write"])
    parser.add_argument("names", nargs="*", help="of environments; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="that run at a time")
    options = parser.parse_args()
    if options.what == "run":
        return 0 if run(options.names, options.jobs) else 1
    with open(PAGE, encoding="utf-8") as file:
        text = file.read()
    with open(PAGE, "w", encoding="utf-8") as file:
        file.write(page_with(text, load()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
