"""A pytest plugin that compiles the core with the sanitizers: `make test-sanitized`.

bfloat16 goes in pairs there, as on a CPU that has the instruction for it.
"""

import functools

from sparse_attention.native import libraries

FLAGS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS += ["-DSPATTN_PAIRS_WITHOUT_DPBF16"]

libraries.build_core = functools.partial(libraries.build_core, extra_flags=FLAGS)
