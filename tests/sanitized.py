"""Imported, as a plugin of pytest say, it compiles all libraries with the sanitizers.

`make test-sanitized` and `python -m tests.fuzz --sanitized` do. bfloat16 goes in pairs
there, as on a CPU that has the instruction for it.
"""

from sparse_attention.native import libraries

FLAGS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS += ["-DSPATTN_PAIRS_WITHOUT_DPBF16"]

libraries.FLAGS += FLAGS
