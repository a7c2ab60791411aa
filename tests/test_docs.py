"""README and docs: their snippets run, their links lead somewhere, their commands exist."""

import doctest
import importlib.util
import os
import re
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]
PAGES += sorted("docs/" + n for n in os.listdir(ROOT + "/docs") if n.endswith(".md"))
# What these pages show needs Keras 3, which Python 3.7 and its TensorFlow are too old for.
KERAS_3_PAGES = ["README.md"]
KERAS_3_PAGES += [
    f"docs/{name}.md"
    for name in ("generation", "images", "keras", "moving", "score-rules", "training")
]


def text_of(page):
    with open(os.path.join(ROOT, page), encoding="utf-8") as file:
        return file.read()


def snippets_of(page):
    return re.findall(r"^```python\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def runs_here(page):
    return bool(snippets_of(page)) and (
        sys.version_info >= (3, 8) or page not in KERAS_3_PAGES
    )


@pytest.mark.parametrize("page", filter(runs_here, PAGES))
def test_snippets_run(page):
    """The snippets of a page are one program; after `>>>` stands what Python prints."""
    namespace = {"__name__": page}
    for snippet in snippets_of(page):
        if snippet.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(
                snippet, namespace, page, page, 0
            )
            results = doctest.DocTestRunner().run(test, clear_globs=False)
            assert results.attempted and not results.failed
            namespace = test.globs
        else:
            exec(compile(snippet, page, "exec"), namespace)


def test_the_pages_that_must_have_snippets_do():
    assert len(snippets_of("README.md")) == 4
    assert all(
        snippets_of(f"docs/{name}.md") for name in ("keras", "patterns", "training")
    )
    # None is left out because its fence has another word.
    assert not re.findall(r"^```(?!python\n|\n)", "".join(map(text_of, PAGES)), re.M)


def slugs_of(page):
    """The anchors that a Markdown renderer makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return [
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    ]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(page), path))
        target = page if not path else target
        assert os.path.exists(os.path.join(ROOT, target)), link
        if anchor:
            assert anchor in slugs_of(target), link


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    text = text_of(page)
    for script in re.findall(r"python3? (?:\S+=\S+ )*([\w/]+\.py)", text):
        assert os.path.exists(os.path.join(ROOT, script)), script
    for module in re.findall(r"python3? -m (sparse_attention[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    for path in re.findall(r"pytest .*?(tests/[\w/]+(?:\.py)?)", text):
        assert os.path.exists(os.path.join(ROOT, path)), path
    with open(os.path.join(ROOT, "Makefile")) as file:
        makefile = file.read()
    for target in re.findall(r"(?:^    |`)make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^(.* )?{target}( .*)?:", makefile, re.MULTILINE), target


def files():
    yield from ("/" + name for name in os.listdir(ROOT))
    for room in (
        "sparse_attention",
        "tests",
        "benchmarks",
        "docs",
        "examples",
        "tools",
    ):
        for folder, _, names in os.walk(os.path.join(ROOT, room)):
            for name in names:
                yield "/" + os.path.relpath(os.path.join(folder, name), ROOT)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    known = list(files())
    for path in re.findall(r"`([\w/]+\.(?:py|cc|h|cu|cuh))`", text_of(page)):
        assert any(name.endswith("/" + path) for name in known), path


def test_the_house_has_every_module():
    house = re.search(
        r"^    sparse_attention/\n.*?\n\n", text_of("docs/developing.md"), re.S | re.M
    )
    modules = {
        name[: -len(".py")]
        for _, _, names in os.walk(os.path.join(ROOT, "sparse_attention"))
        for name in names
        if name.endswith(".py") and name != "__init__.py"
    }
    assert modules <= set(re.findall(r"\w+", house.group()))


def test_every_benchmark_is_described():
    scripts = [n for n in os.listdir(ROOT + "/benchmarks") if n.endswith(".py")]
    missing = [name for name in scripts if name not in text_of("benchmarks/README.md")]
    assert scripts and not missing


def test_every_exported_name_is_in_the_reference_once():
    import sparse_attention as sa

    named = []
    for page in os.listdir(ROOT + "/docs/api"):
        for names in re.findall(
            r"^\.\. exported::((?:\n? +[\w.]+)+)", text_of(f"docs/api/{page}"), re.M
        ):
            named += (name for name in names.split() if "." not in name)
    assert sorted(named) == sorted(sa.__all__)


def test_the_names_that_the_docs_use_are_exported():
    import sparse_attention as sa

    text = "".join(map(text_of, PAGES))
    assert set(re.findall(r"\bsa\.([A-Za-z]\w*)", text)) <= {*sa.__all__, "__all__"}
