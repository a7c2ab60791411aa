"""The example that checks itself."""

import pathlib

from helpers import PATTERNS
from tf_helpers import run_script

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"

EXAMPLE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import attention

print(attention.main())
attention.PATTERNS = {"local": attention.PATTERNS["local"]}
right = attention.blocksparse_attention_impl
for shift in (1e-4, float("nan")):
    attention.blocksparse_attention_impl = lambda *a, **k: right(*a, **k) + shift
    print(attention.main())
"""


def test_example_is_right_and_tells_a_wrong_result():
    lines = run_script(EXAMPLE, EXAMPLES).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == list(PATTERNS)
    assert lines[6:8] == ["all right", "0"]
    assert [x for x in lines if x.startswith("WRONG") or x == "1"] == 2 * [
        "WRONG: a difference is above its tolerance",
        "1",
    ]
