"""Reader of the documentation of installed Python packages: docstrings by syntax tree, nothing is imported.

The summary line of a docstring is a query that its remaining text answers, so every document comes with a
natural pair. Reading the source instead of importing is safe (no code runs) and complete (modules that need a
display or a GPU are read too).
"""

import ast
import gc
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedloom.config.corpus import CorpusSource
from embedloom.core.progress import note
from embedloom.corpus.clean import SourceRow
from embedloom.errors import DataError

INSTRUCTION = "Given a summary of a Python object, retrieve its documentation"
MIN_SUMMARY_CHARACTERS, MAX_SUMMARY_CHARACTERS = 15, 200
# Test code and copies of other packages; a copy would stand in the corpus under a wrong name.
_SKIPPED_FOLDERS = {
    "test", "tests", "testing", "conftest", "__pycache__", "site-packages", "dist-packages",
    "_vendor", "vendor", "_vendored", "vendored", "extern", "externals", "_external", "third_party",
}  # fmt: skip
_DOCSTRING_QUOTES = (b'"""', b"'''")
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_python_docs(source: CorpusSource) -> Iterator[SourceRow]:
    """One row for each public module, class and function whose docstring has a summary and more text.

    A module file may start with an underscore, since many packages keep their public objects there; a class,
    function or method with a leading underscore is private and left out.

    Raises:
        DataError: a package that is not installed, or has no Python source.
    """
    for package in source.packages:
        root, files = _python_files(package)
        unreadable = 0
        for path in files:
            found = _docstrings(path)
            if found is None:
                unreadable += 1
                continue
            module = _module_name(path, root, package)
            for name, docstring in found:
                row = _row(docstring, f"{module}.{name}".rstrip("."), module, package, source)
                if row is not None:
                    yield row
        if unreadable:
            note(
                "corpus",
                f"{package}: {unreadable} files are not valid Python for this version and were passed over",
            )


def split_docstring(docstring: str) -> tuple[str, str]:
    """Summary (the first paragraph, on one line) and the rest."""
    summary, _, rest = docstring.strip().partition("\n\n")
    return " ".join(summary.split()), rest.strip()


def _row(docstring: str, name: str, module: str, package: str, source: CorpusSource) -> SourceRow | None:
    summary, text = split_docstring(docstring)
    if not text or not MIN_SUMMARY_CHARACTERS <= len(summary) <= MAX_SUMMARY_CHARACTERS:
        return None
    return SourceRow(
        text=text,
        source=f"{source.name or package}:{name}",
        group=module,
        lang=source.lang or "eng",
        queries=(summary,),
        instruction=INSTRUCTION,
    )


def _python_files(package: str) -> tuple[Path, list[Path]]:
    """Folder or file of a top-level package, and its source files in name order."""
    allowed = "allowed: installed top-level packages and modules, such as 'numpy' or 'json'"
    if not package.isidentifier():
        raise DataError(f"corpus.sources: packages: {package!r} is not a top-level package name; {allowed}")
    try:
        spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise DataError(f"corpus.sources: packages: {package!r} is not installed; {allowed}")
    if spec.submodule_search_locations:
        root = Path(next(iter(spec.submodule_search_locations)))
        files = sorted(path for path in root.rglob("*.py") if not _is_skipped(path.relative_to(root)))
    else:
        # Modules frozen into the interpreter (os, ...) have a source file all the same.
        frozen = getattr(spec.loader_state, "filename", None) if spec.origin == "frozen" else None
        root = Path(str(frozen or spec.origin))
        files = [root] if root.suffix == ".py" and root.is_file() else []
    if not files:
        raise DataError(
            f"corpus.sources: packages: {package!r} has no Python source files ({root}); {allowed}"
        )
    return root, files


def _is_skipped(relative: Path) -> bool:
    names = {*relative.parts[:-1], relative.stem}
    return bool(names & _SKIPPED_FOLDERS) or any(
        name.startswith("test_") or name.endswith("_test") for name in names
    )


def _module_name(path: Path, root: Path, package: str) -> str:
    if path == root:
        return package
    return ".".join((package, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


def _docstrings(path: Path) -> list[tuple[str, str]] | None:
    """(name below the module, docstring) of the public objects of a file; None if it is not valid Python."""
    content = path.read_bytes()
    if not any(quotes in content for quotes in _DOCSTRING_QUOTES):
        return []  # a docstring with more than a summary spans lines, so it has triple quotes
    with _quiet_parser():
        try:
            # The tree must be gone before the collector is back, or it is walked once after all.
            return list(_documented(ast.parse(content), ""))
        except (SyntaxError, ValueError):
            return None


def _documented(node: _Documented, name: str) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield name, docstring
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, _DEFINITIONS) and not child.name.startswith("_"):
                yield from _documented(child, f"{name}.{child.name}".lstrip("."))


@contextmanager
def _quiet_parser() -> Iterator[None]:
    """Parse without warnings about other people's escape sequences, and without the garbage collector.

    It would walk the growing tree again and again: parsing takes five times as long with it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if enabled:
            gc.enable()
