"""A pytest plugin that compiles the core with the sanitizers: `make test-sanitized`."""

import functools

from sparse_attention import _build

FLAGS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

_build.build_core = functools.partial(_build.build_core, extra_flags=FLAGS)
