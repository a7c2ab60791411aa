"""The table of versions in the docs: what the results say, and no cell left out."""

import importlib
import json
import os

import pytest

TOOLS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools")


@pytest.fixture
def matrix(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("version_matrix")


def test_the_table_of_the_docs_is_what_the_results_say(matrix):
    with open(matrix.PAGE, encoding="utf-8") as file:
        text = file.read()
    assert matrix.page_with(text, matrix.load()) == text, "make test-matrix writes it"


def test_results_are_of_cells_that_exist(matrix):
    with open(matrix.RESULTS) as file:
        rows = json.load(file)
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    assert set(names) <= {cell.name for cell in matrix.CELLS}
    for row in rows:
        assert ("not_run" in row) != ("passed" in row) and row["commit"]


ROW = {
    "name": "2.15",
    "python": "3.10.13",
    "numpy": "1.26.4",
    "tensorflow": "2.15.1",
    "keras": "2.15.0",
    "compiler": "g++ (Debian 12.2.0-14+deb12u1) 12.2.0",
    "why_not": None,
    "passed": 329,
    "failed": 0,
    "skipped": 0,
}


@pytest.mark.parametrize(
    "changes, compiler, told",
    [
        ({}, "g++ 12.2.0", "329 passed"),
        ({"failed": 3, "skipped": 1}, "g++ 12.2.0", "329 passed, 3 failed, 1 skipped"),
        (
            {"compiler": "Debian clang version 19.1.7 (3~deb12u1)"},
            "clang++ 19.1.7",
            "329 passed",
        ),
        (
            {"why_not": "no compiler"},
            "g++ 12.2.0",
            "329 passed, without the compiled op: no compiler",
        ),
    ],
)
def test_a_line_says_what_failed(changes, compiler, told, matrix):
    line = matrix.cells_of({**ROW, **changes})
    assert line == ["2.15", "2.15.1", "2.15.0", "3.10.13", "1.26.4", compiler, told]


def test_what_was_not_run_is_never_passed(matrix):
    """Not where a compiler or a Python is missing, nor where nobody has tried."""
    absent = matrix.Cell("2.15", "3.10", compiler="g++-of-nobody")
    row = matrix.result_of(absent)
    assert row["not_run"] == "no g++-of-nobody" and "passed" not in row
    row = matrix.result_of(matrix.Cell("none", "2.9"))
    assert row["not_run"] == "no Python 2.9"
    lines = matrix.table([ROW]).split("\n")[2:]
    assert len(lines) == len(matrix.CELLS)
    assert sum("329 passed" in line for line in lines) == 1
    assert sum("not run: no result yet" in line for line in lines) == len(lines) - 1
