"""The documentation: what is generated is current, and what it tells people to type works.

A comment before a fenced block says what is done with the block:

    <!-- run -->           a console, bash or Python block is executed; all of a page share one temporary folder
    <!-- run: fails -->    the same, and the last command must end with exit code 2
    <!-- run: served -->   the same, beside a model without weights that answers at http://127.0.0.1:8000
    <!-- yaml: KIND -->    how a YAML block is read: config (sections of a run config, laid over the quickstart; the
                           default), ablation, cluster, keys

What a console block shows below its commands must be lines of their real output, in this order; "…" stands for any text.
Every other line that calls ``embedloom`` is parsed: the command, its options and their types exist.
"""

import copy
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import uvicorn
import yaml

from embedloom.cli import app
from embedloom.config.ablation import AblationConfig
from embedloom.config.base import validate
from embedloom.config.cluster import ClusterConfig
from embedloom.config.run import RunConfig
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.storage import Place
from embedloom.serving.front import parse_keys
from embedloom.serving.schemas import CorpusCard, SearchHit
from fakes_serving import FakeEncoder, api_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
QUICKSTART = yaml.safe_load((ROOT / "jobs/configs/quickstart.yaml").read_text())
BLOCK = re.compile(
    r"^(?P<indent>[ ]*)(?:<!-- (?P<mark>(?:run|yaml)\b[^>]*?) -->\n+(?P=indent))?```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
NAME = "quickstart"  # of the model that answers served blocks
SECONDS = 120


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text[: found.start("language")].count("\n") + 1, found["language"], found["mark"] or "",
              textwrap.dedent(found["body"]))
        for found in BLOCK.finditer(text)
    ]  # fmt: skip


EVERY = [block for page in PAGES for block in blocks(page)]


def of(*languages: str, mark: str | None = None) -> list[Block]:
    return [one for one in EVERY if one.language in languages and (mark is None or one.mark.startswith(mark))]


def test_every_fence_is_a_block():
    fences = sum(len(re.findall(r"^ *```", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(EVERY), "a fence without a language, or one that is not closed"


# --- what is generated ------------------------------------------------------------------------------------------------


def generator():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current():
    module = generator()
    stale = [
        str(page)
        for page in module.PAGES.glob("*.md")
        if module.current(page.read_text()) != page.read_text()
    ]
    assert not stale, "run: python docs/generate.py"


def test_every_generated_part_is_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    assert [name for name in generator().PARTS if f"<!-- generated: {name} -->" not in text] == []


def test_manifest_keys_are_documented(tmp_path):
    writer = ArtefactWriter(
        Place(str(tmp_path / "a")), "corpus", "0" * 16, {}, "local", origin={"settings": []}
    )
    written = set(writer.commit({}, scratch=["steps"]).manifest)
    section = re.search(
        r"### manifest\.json\n(.*?)\n## ", (DOCS / "reference/formats.md").read_text(), re.DOTALL
    )[1]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == written


def test_error_codes_are_documented():
    serving = ROOT / "platform/embedloom/serving"
    source = "".join(path.read_text() for path in serving.rglob("*.py"))
    raised = set(re.findall(r'code="([a-z_]+)"', source))
    raised |= {
        code
        for call in re.findall(r"Refusal\((.*?)\)\n", source, re.DOTALL)
        for code in re.findall(r'"([a-z]+_[a-z_]+)"', call)
    }
    raised -= {"contract_hash"}  # a field, named beside a code
    assert len(raised) > 25
    told = set(re.findall(r"`([a-z_]+)`", (DOCS / "reference/errors.md").read_text()))
    assert raised - told == set()


# --- links of files that the site does not build ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "llms.txt"])
def test_links_of_the_front_pages_lead_somewhere(name):
    page = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_shows_what_it_does_first():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    first = blocks(ROOT / "README.md")[0]
    assert first.language == "console" and len(steps(first)) == 2
    assert all(shown for _, shown in steps(first)), "a command without its output"
    assert first.line + len(first.text.splitlines()) + 1 <= 25


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert [page for page in pages if page not in text] == []


# --- YAML -------------------------------------------------------------------------------------------------------------


def laid_over(base: dict, content: dict) -> dict:
    merged = copy.deepcopy(base)
    for key, value in content.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = laid_over(merged[key], value) if both else value
    return merged


@pytest.mark.parametrize("block", of("yaml"), ids=lambda block: block.where)
def test_yaml_is_accepted(block):
    content = yaml.safe_load(block.text)
    match block.mark.removeprefix("yaml").strip(": ") or "config":
        case "config":
            base = copy.deepcopy(QUICKSTART)
            if "corpus" in content:  # whose pairs may be called otherwise than the quickstart's mix asks for
                base["training"] |= {"runs": [{"name": "own", "seed": 1}]}
                for stage in base["training"]["stages"]:
                    stage["sources"] = [{"name": "own", "format": "mined"}]
            validate(RunConfig, laid_over(base, content), block.where)
        case "training":  # its sources stand in for the quickstart's mix, with the pairs that they ask for
            base = copy.deepcopy(QUICKSTART)
            del base["training"]["mix"], base["training"]["runs"]
            faq = {"format": "parquet", "path": "faq.parquet", "query_column": "question", "dataset": "faq"}
            base["corpus"]["sources"].append(faq)
            validate(RunConfig, laid_over(base, content), block.where)
        case "ablation":
            validate(AblationConfig, content, block.where)
        case "cluster":
            whole = yaml.safe_load((ROOT / "cluster/cluster.yaml").read_text())
            validate(ClusterConfig, laid_over(whole, content), block.where)
        case "keys":
            parse_keys(block.text, block.where)
        case kind:
            pytest.fail(f"{block.where}: unknown kind {kind!r}")


# --- commands that are only parsed ------------------------------------------------------------------------------------


def calls(block: Block) -> list[list[str]]:
    """The embedloom commands of a block, comments and what follows a pipe left out."""
    text = block.text.replace("\\\n", " ")
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    found = []
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "embedloom":
            found.append(
                words[
                    1 : next((n for n, word in enumerate(words) if word in ("|", ">", "2>", "&", "&&")), None)
                ]
            )
    return found


CALLS = [(block.where, call) for block in of("console", "bash") for call in calls(block)]


@pytest.mark.parametrize(
    ("where", "words"), CALLS, ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60]
)
def test_every_command_exists_with_its_options(where, words):
    command, name, words = typer.main.get_command(app), "embedloom", list(words)
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"{where}: no command {words[:1]} of {name}"
        name = words.pop(0)
        command = command.commands[name]
    command.make_context(name, words)  # raises a usage error that names the option


# --- blocks that are run ----------------------------------------------------------------------------------------------


class OneDocument:
    """A corpus that always finds the same."""

    card = CorpusCard(documents=1, dimension=8, index="exact", texts=True)
    contract_hash = FakeEncoder(limit=256).contract.hash

    def search(self, query, count, with_texts, words=None):
        return [
            SearchHit(
                id="d", score=0.5, title="sorted", text="Return a new sorted list." if with_texts else None
            )
        ]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Address of a served model without weights."""
    api = api_of(FakeEncoder(limit=256), served_name=NAME, corpus=OneDocument(), max_requests=16)
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def shell(tmp_path, endpoint):
    """Runs a command line as a reader would, in an empty folder beside the project's configs; returns its result."""
    module, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][
        "embedloom"
    ].split(":")
    program = tmp_path / "bin" / "embedloom"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from {module} import {function}; {function}()" "$@"\n'
    )
    program.chmod(0o755)
    (program.parent / "python").symlink_to(sys.executable)
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("jobs", "cluster", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    environment = {
        **os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "platform"),
        "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", "COLUMNS": "200",
    }  # fmt: skip

    def run(command: str | list[str]) -> subprocess.CompletedProcess[str]:
        if isinstance(command, str):
            command = ["bash", "-euo", "pipefail", "-c", command]
        command = [word.replace("127.0.0.1:8000", endpoint) for word in command]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )

    return run


def steps(block: Block) -> list[tuple[str, list[str]]]:
    """Each command of a console block with the lines that are shown below it."""
    found: list[tuple[str, list[str]]] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line.strip():
            found[-1][1].append(line)
    return found


def like(shown: str, line: str) -> bool:
    parts = [re.escape(part) for part in " ".join(shown.split()).split("…")]
    return re.fullmatch(r".*".join(parts), " ".join(line.split())) is not None


def assert_shown(shown: list[str], real: str, where: str) -> None:
    lines = iter(real.splitlines())
    for one in shown:
        if one.strip() != "…":
            assert any(like(one, line) for line in lines), (
                f"{where}: not in the output, or not in this place: {one!r}\n{real}"
            )


RUN_PAGES = sorted({block.page for block in of("console", "bash", "python", mark="run")})


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run_as_shown(page, shell):
    for block in blocks(page):
        if not block.mark.startswith("run") or block.language not in ("console", "bash", "python"):
            continue
        wanted = 2 if block.mark == "run: fails" else 0
        if block.language == "python":
            done = shell([sys.executable, "-c", block.text])
            assert done.returncode == wanted, f"{block.where}: {done.stderr}"
            continue
        todo = steps(block) if block.language == "console" else [(block.text, [])]
        for number, (command, shown) in enumerate(todo):
            done = shell(command)
            expected = wanted if number == len(todo) - 1 else 0
            assert done.returncode == expected, f"{block.where}: {command}\n{done.stdout}{done.stderr}"
            assert_shown(shown, done.stdout + done.stderr, block.where)


@pytest.mark.parametrize("block", of("python"), ids=lambda block: block.where)
def test_python_compiles(block):
    compile(block.text, block.where, "exec")
