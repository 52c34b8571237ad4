"""The architecture, executable: which packages there are, which may import which, and what must not be there at all."""

import ast
import platform
import subprocess
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "platform" / "embedloom"
TOP_LEVEL = {
    ".ci", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile",
    "README.md", "benchmarks", "cluster", "docker", "docs", "jobs", "llms.txt", "mkdocs.yml", "platform", "pyproject.toml", "serve",
    "tests",
}  # fmt: skip
LEFT_BY_RUNNING = set((ROOT / ".gitignore").read_text().replace("/\n", "\n").split()) | {".git"}
PACKAGES = {
    "cli", "cluster", "compute", "config", "core", "corpus", "documents", "encoder", "evaluation", "merging", "mining", "pipeline",
    "planning", "raydata", "report", "retrieval", "serving", "synthesis", "training",
}  # fmt: skip
HEAVY_LIBRARIES = {"torch", "ray", "vllm", "transformers", "deepspeed", "mteb", "sentence_transformers"}
INNER_PACKAGES = {"serving/batches", "serving/rollout", "synthesis/families"}
MAX_FUNCTION_LINES = 60
MAX_JOB_LINES = 40


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, modules: set[str]) -> Iterator[str]:
    """Modules of ours that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name in modules:
                yield name
            elif name.rpartition(".")[0] in modules:
                yield name.rpartition(".")[0]


def import_graph() -> dict[str, set[str]]:
    modules = {module_name(path): path for path in python_files()}
    return {name: set(imports_of(path, set(modules))) - {name, "embedloom"} for name, path in modules.items()}


def tiers() -> list[set[str]]:
    """Packages by tier, the uppermost first, as import-linter checks them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(one for one in settings["contracts"] if one["type"] == "layers")["layers"]
    return [{name.strip().removeprefix("embedloom.") for name in layer.split("|")} for layer in layers]


def test_platform_folder_has_no_init():
    # A regular package named "platform" shadows the standard library, and every Ray worker dies in `import ray`.
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert hasattr(platform, "system")


@pytest.mark.parametrize("folder", ["jobs", "serve", "cluster", "benchmarks"])
def test_folders_with_library_names_are_not_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_top_level_holds_the_prescribed_entries_only():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    # Outside a git checkout (an unpacked archive) every file counts; what running leaves behind is hidden or ignored.
    entries = {line.split("/")[0] for line in tracked.splitlines()} or {path.name for path in ROOT.iterdir()}
    assert entries - LEFT_BY_RUNNING <= TOP_LEVEL


def test_the_root_of_the_package_holds_packages_only():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py"}
    found = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("__init__.py")} - {"."}
    assert found == PACKAGES | INNER_PACKAGES


def test_every_package_has_its_tier():
    placed = [name for tier in tiers() for name in sorted(tier)]
    assert sorted(placed) == sorted(PACKAGES | {"errors"})


def test_imports_lead_down_the_tiers():
    height = {name: -number for number, tier in enumerate(tiers()) for name in tier}
    for module, imported in import_graph().items():
        own = module.split(".")[1:2]
        for other in imported:
            package = other.split(".")[1]
            if own and own[0] in height and package != own[0]:
                assert height[package] < height[own[0]], f"{module} imports {other}"


def test_files_import_each_other_in_no_circle():
    order = list(TopologicalSorter(import_graph()).static_order())  # CycleError names the circle
    assert order.index("embedloom.core.storage") < order.index("embedloom.pipeline.graph")


def loaded_by(module: str) -> dict[str, set[str]]:
    """Libraries that importing a module imports, by the module of ours that does; imports inside functions wait."""
    modules = {module_name(path): path for path in python_files()}
    found, todo = {}, [module]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found[name] = set()
        todo += [name.rpartition(".")[0]] if "." in name else []
        nodes = list(ast.parse(modules[name].read_text()).body)
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            nodes += ast.iter_child_nodes(node)
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for one in imported:
                found[name].add(one.split(".")[0])
                todo += [part for part in (one, one.rpartition(".")[0]) if part in modules]
    return found


# Modules whose import must stay cheap, and what it must not bring along.
LIGHT = {
    "embedloom.cli": HEAVY_LIBRARIES,
    "embedloom.pipeline.ablation": HEAVY_LIBRARIES,
    "embedloom.pipeline.commands": HEAVY_LIBRARIES,
    "embedloom.pipeline.lineage": HEAVY_LIBRARIES,
    "embedloom.pipeline.model_commands": HEAVY_LIBRARIES,
    "embedloom.pipeline.plan": HEAVY_LIBRARIES,
    "embedloom.pipeline.submit": HEAVY_LIBRARIES,
    "embedloom.serving.address": HEAVY_LIBRARIES,
    "embedloom.serving.gateway": HEAVY_LIBRARIES - {"ray"},  # without a corpus it needs no model
    "embedloom.serving.listener": HEAVY_LIBRARIES,  # loaded in each of Serve's processes that listen
}


@pytest.mark.parametrize("module", LIGHT)
def test_importing_a_light_module_loads_no_heavy_library(module):
    heavy = {name: libraries & LIGHT[module] for name, libraries in loaded_by(module).items()}
    assert not {name: sorted(libraries) for name, libraries in heavy.items() if libraries}


def test_no_catch_all_modules():
    names = {path.stem for path in python_files()}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_functions_stay_readable():
    for path in [*python_files(), *(ROOT / "jobs").glob("*.py"), *(ROOT / "serve").glob("*.py")]:
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name}"


def test_entry_points_hold_no_logic():
    for path in [*(ROOT / "jobs").glob("*.py"), *(ROOT / "serve").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= MAX_JOB_LINES, path


def test_no_machine_paths_in_the_project():
    for path in [*python_files(), *(ROOT / "jobs").rglob("*.*"), *(ROOT / "cluster").rglob("*.*")]:
        if path.suffix in {".py", ".yaml", ".lock"}:
            text = path.read_text()
            assert "/root/" not in text and "/home/" not in text and "/work/" not in text, path
