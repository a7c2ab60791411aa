"""A Sphinx extension: what `sparse_attention` exports, read from the sources.

    .. exported:: block_sparse_attention BlockMask

shows the signatures and docstrings of these names, and the methods of classes that have a
docstring. Nothing is imported, so the pages are built without TensorFlow.
"""

import ast
import glob
import os
import re

from docutils.statemachine import StringList
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.docutils import SphinxDirective

PACKAGE = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "sparse_attention"
)
NAPOLEON = Config(
    napoleon_use_param=False,  # it would take "q, k, v: ..." apart
    napoleon_use_rtype=False,
    napoleon_custom_sections=[
        ("Attributes", "params_style"),
        ("Call arguments", "params_style"),
    ],
)
# Sections whose text begins in the line of their name.
SENTENCES = r"(Numerics|Cost|Reference): "


class Exported(SphinxDirective):
    required_arguments = 1
    final_argument_whitespace = True

    def run(self):
        for path in glob.glob(os.path.join(PACKAGE, "**", "*.py"), recursive=True):
            self.env.note_dependency(path)
        lines = [".. py:currentmodule:: sparse_attention", ""]
        for name in self.arguments[0].split():
            lines += describe(name, *find(name))
        source = f"{self.env.docname}, exported"
        return self.parse_text_to_nodes(StringList(lines, source))


def parsed(*module):
    """The syntax tree of a module of the package."""
    with open(os.path.join(PACKAGE, *module) + ".py", encoding="utf-8") as file:
        return ast.parse(file.read())


def find(name):
    """The module that defines a name, as [folder, file], and the node that does.

    Args:
      name: What `sparse_attention` exports: "BlockMask", or "reference.attention_fwd".
    """
    first, _, rest = name.partition(".")
    for statement in ast.walk(parsed("__init__")):
        if not isinstance(statement, ast.ImportFrom):
            continue
        if first in (alias.name for alias in statement.names):
            room = statement.module.split(".")
            if os.path.isfile(os.path.join(PACKAGE, *room, first + ".py")):
                room.append(first)
                return find_in(room, rest) if rest else (room, parsed(*room))
            return find_in(room, first)
    raise ValueError(f"sparse_attention exports no {name}")


def find_in(module, name):
    for node in parsed(*module).body:
        if getattr(node, "name", None) == name:
            return module, node
        if isinstance(node, ast.Assign) and name in dict(values_of(node)):
            return module, node
        if isinstance(node, ast.ImportFrom) and name in (a.name for a in node.names):
            return find_in([*module[: -node.level], *node.module.split(".")], name)
    raise ValueError(f"{'/'.join(module)}.py has no {name}")


def values_of(assignment):
    """[(name, node of its value)] of `A = 1` and of `A, B = 1, 2`."""
    target, value = assignment.targets[0], assignment.value
    if isinstance(target, ast.Tuple):
        return [(t.id, v) for t, v in zip(target.elts, value.elts)]
    return [(ast.unparse(target), value)]


def describe(name, module, node):
    """Lines of reStructuredText."""
    if isinstance(node, ast.Module):
        return [f".. rubric:: Module sparse_attention.{name}", "", *text_of(node), ""]
    if isinstance(node, ast.Assign):
        value = ast.unparse(dict(values_of(node))[name])
        return [f".. py:data:: {name}", f"   :value: {value}", ""]
    body = text_of(node)
    if isinstance(node, ast.FunctionDef):
        head = f"function:: {name}{arguments(node, module)}{returns(node)}"
    else:
        functions = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        constructor = [f for f in functions if f.name == "__init__"]
        head = f"class:: {name}" + "".join(arguments(f, module) for f in constructor)
        for function in functions:
            if not function.name.startswith("_") and ast.get_docstring(function):
                body += member(function, module)
    return [f".. py:{head}", "", *indented(body), ""]


def member(function, module):
    name, decorators = function.name, [ast.unparse(d) for d in function.decorator_list]
    if f"{name}.setter" in decorators:
        return []
    if "property" in decorators:
        head = [f".. py:property:: {name}"]
        if function.returns:
            head += [f"   :type: {ast.unparse(function.returns)}"]
    else:
        head = [
            f".. py:method:: {name}{arguments(function, module)}{returns(function)}"
        ]
        head += [
            f"   :{d}:" for d in decorators if d in ("classmethod", "staticmethod")
        ]
    return ["", *head, "", *indented(text_of(function))]


def arguments(function, module):
    """ "(q, k=1)", without `self` and `cls`, with the values of constants."""
    for default in (d for d in function.args.defaults if isinstance(d, ast.Name)):
        value = dict(values_of(find_in(module, default.id)[1]))[default.id]
        default.id = ast.unparse(value)
    text = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(function.args))
    if any("recomputable" in ast.unparse(d) for d in function.decorator_list):
        text += ", recompute: bool = False"  # what the decorator adds
    return f"({text})"


def returns(function):
    return f" -> {ast.unparse(function.returns)}" if function.returns else ""


def indented(lines):
    return ["   " + line if line else "" for line in lines]


def text_of(node):
    """The lines of a docstring as reStructuredText.

    Drawings and formulas, which are indented, are literal blocks; so are backticks. A
    section whose text begins in its first line is a paragraph.
    """
    lines, out = (ast.get_docstring(node) or "").split("\n"), []
    before = ""
    for line in lines:
        starts_block = not before and re.match("    ", line) and out
        if starts_block and not in_section(out):
            out += ["::", ""]
        if re.match(SENTENCES, line):
            name, text = line.split(": ", 1)
            out += ["", f"**{name}:** {text}"]
        elif out and is_sentence(out) and line.startswith("  "):
            out.append(line.strip())
        elif before and section_of(out) == "Returns:" and line.startswith("    "):
            out.append("  " + line.strip())  # or it would be a list of definitions
        else:
            out.append(line)
        before = line.strip()
    return str(GoogleDocstring("\n".join(out), NAPOLEON)).split("\n")


def section_of(lines):
    """The last line that is not indented."""
    return next((x for x in reversed(lines) if x and not x.startswith(" ")), "")


def in_section(lines):
    last = section_of(lines)
    return last.endswith(":") and last != "::"


def is_sentence(lines):
    for line in reversed(lines):
        if not line:
            return False
        if line.startswith("**"):
            return True
    return False


def setup(app):
    app.add_directive("exported", Exported)
    return {"parallel_read_safe": True}
