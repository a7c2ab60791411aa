"""Sphinx's configuration: `make docs` builds the pages into build/docs.

The root of the repository is the source folder, so that the Markdown pages are used as they
stand and their links lead to the same files here and there. The API reference is read from
the sources by `exported.py`: nothing is imported.
"""

import os
import re
import shutil
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, HERE)

# The sidebar: captions and pages, in the order of reading.
CHAPTERS = {
    "Guides": "docs/choosing docs/patterns docs/score-rules docs/keras docs/training "
    "docs/generation docs/images docs/moving",
    "Facts": "docs/numerics docs/performance docs/versions docs/limits",
    "API": "docs/api/attention docs/api/keras docs/api/plans docs/api/patterns "
    "docs/api/openai",
    "Project": "docs/developing CONTRIBUTING sparse_attention/csrc/cpu/README "
    "benchmarks/README CHANGELOG",
}

with open(os.path.join(ROOT, "sparse_attention", "__init__.py")) as file:
    release = re.search(r'^__version__ = "(.*)"$', file.read(), re.MULTILINE).group(1)
project = "sparse_attention"
extensions = ["myst_parser", "exported"]
root_doc = "README"
include_patterns = ["*.md", "docs/**", "benchmarks/README.md"]
include_patterns += ["sparse_attention/csrc/cpu/README.md"]
exclude_patterns = [".*", "**/.*", "build", "dist", "tests"]
default_role = "py:obj"  # `x` in a docstring: a link where x is a name of ours, or code
highlight_language = "none"  # an indented block is a command or a drawing
python_maximum_signature_line_length = 80
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"sparse_attention {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False


def _add_sidebar(app, docname, source):
    """README.md is the first page; on it the others hang, without a trace in the file."""
    if docname == root_doc:
        for caption, pages in CHAPTERS.items():
            lines = "\n".join("/" + page for page in pages.split())
            source[0] += (
                f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"
            )


def _add_index(app, exception):
    """What a server shows for the folder."""
    if exception is None and app.builder.format == "html":
        shutil.copy(
            os.path.join(app.outdir, "README.html"),
            os.path.join(app.outdir, "index.html"),
        )


def setup(app):
    app.connect("source-read", _add_sidebar)
    app.connect("build-finished", _add_index)
