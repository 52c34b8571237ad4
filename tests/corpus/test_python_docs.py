import gc
import sys

import pytest

from embedloom.config.corpus import CorpusSource
from embedloom.corpus.python_docs import INSTRUCTION, read_python_docs, split_docstring
from embedloom.errors import DataError

BODY = "The rest of the text, which explains at some length what the thing does."


def docstring(summary):
    return f'"""{summary}\n\n    {BODY}\n    """'


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose every module raises when it is imported."""
    root = tmp_path / "sampledocs"
    (root / "_impl" / "tests").mkdir(parents=True)
    (root / "_vendor").mkdir()
    (root / "__init__.py").write_text(
        f"{docstring('The package as a whole, summarised.')}\nraise RuntimeError\n"
    )
    (root / "_impl" / "core.py").write_text(
        f'''raise RuntimeError("imported")

def public(x):
    """Compute the public thing of x,
    over two lines.

    {BODY}
    """

def _private():
    {docstring("A private function, left out.")}

def one_line():
    """Only a summary, no body at all."""

class Thing:
    {docstring("A thing with methods and more.")}

    async def method(self):
        {docstring("Do what a method of a thing does.")}

    def short(self):
        {docstring("Too short.")}
'''
    )
    (root / "broken.py").write_text('"""Not Python.\n\nbody"""\ndef (:\n')
    (root / "escape.py").write_text('"""A module with \\d, which warns.\n\n' + BODY + '"""\n')
    for place in ("_impl/tests/test_core.py", "_vendor/copy.py", "conftest.py", "test_top.py"):
        (root / place).write_text(docstring("Tests and copies are left out.") + "\n")
    (tmp_path / "singlemodule.py").write_text(docstring("A module of a single file.") + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    return root


def rows_of(*packages, **settings):
    return list(read_python_docs(CorpusSource(format="python_docs", packages=packages, **settings)))


def test_public_objects_are_read_without_importing(package, capsys):
    rows = {row.source: row for row in rows_of("sampledocs", "singlemodule")}
    assert list(rows) == [
        "sampledocs:sampledocs",
        "sampledocs:sampledocs._impl.core.public",
        "sampledocs:sampledocs._impl.core.Thing",
        "sampledocs:sampledocs._impl.core.Thing.method",
        "sampledocs:sampledocs.escape",
        "singlemodule:singlemodule",
    ]
    public = rows["sampledocs:sampledocs._impl.core.public"]
    assert public.queries == ("Compute the public thing of x, over two lines.",)
    assert (public.text, public.group, public.title, public.lang) == (
        BODY,
        "sampledocs._impl.core",
        None,
        "eng",
    )
    assert public.instruction == INSTRUCTION
    assert rows["sampledocs:sampledocs._impl.core.Thing.method"].group == "sampledocs._impl.core"
    assert not {"sampledocs", "singlemodule"} & set(sys.modules)
    assert "1 files are not valid Python" in capsys.readouterr().err
    assert gc.isenabled()


def test_name_and_language_of_the_source_are_used(package):
    row = rows_of("singlemodule", name="docs", lang="deu")[0]
    assert (row.source, row.lang) == ("docs:singlemodule", "deu")


def test_standard_library_modules_are_read():
    rows = rows_of("os", "textwrap")  # os is frozen into the interpreter, textwrap is one file
    assert {row.group for row in rows} == {"os", "textwrap"}
    assert any(row.source == "os:os.walk" for row in rows)


@pytest.mark.parametrize("name", ["no_such_package_here", "sampledocs.core", "not-a-name"])
def test_a_package_that_is_not_there_is_named(name, package):
    with pytest.raises(DataError, match=rf"packages: '{name}' .*allowed: installed top-level packages"):
        rows_of(name)
    assert "sampledocs" not in sys.modules


def test_a_package_without_python_source_is_named():
    with pytest.raises(DataError, match="packages: 'sys' has no Python source"):
        rows_of("sys")


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("One\n  line.\n\n  Rest\n\n  more.", ("One line.", "Rest\n\n  more.")),
        ("Only a summary.", ("Only a summary.", "")),
        ("", ("", "")),
    ],
)
def test_split_docstring(docstring, expected):
    assert split_docstring(docstring) == expected
