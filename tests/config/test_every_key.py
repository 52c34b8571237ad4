"""Every key of every YAML file we ship or read, misspelt at every depth: the error names the right one, exit code 2.

Keys that a user makes up (names of profiles, pools, origins, languages, prompt fields, variables) have no right
spelling; a section of them is recognised by its type, a plain mapping, and entered but not misspelt.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedloom.cluster.render import check_runtime_env, check_serve_config
from embedloom.config.ablation import AblationConfig
from embedloom.config.base import validate
from embedloom.config.cluster import ClusterConfig
from embedloom.config.rates import RatesConfig
from embedloom.config.run import RunConfig
from embedloom.errors import ConfigError
from embedloom.synthesis.prompt import Prompt

ROOT = Path(__file__).parents[2]
# Mappings whose keys are the user's own, by the name of the section.
OWN_KEYS = {
    "profiles", "pools", "labels", "secrets", "languages", "document_languages", "mix", "env_vars", "attributes", "fields",
    "devices", "models", "where", "stage_hours",
}  # fmt: skip
# An ablation's keys are paths into a run config; tests/pipeline/test_ablation.py misspells those.
PATHS = {"set", "grid"}

Load = Callable[[dict[str, Any]], Any]


def loader(path: Path) -> Load:
    """What reads a file of this kind, from the parsed content on."""
    if path.parent.name == "serve":
        return lambda content: check_serve_config(content, str(path))
    if path.name == "runtime_env.yaml":
        return lambda content: check_runtime_env(content, str(path))
    kinds = {"cluster.yaml": ClusterConfig, "rates.yaml": RatesConfig}
    other = Prompt if "prompts" in path.parts else RunConfig
    model = AblationConfig if path.name.startswith("ablation_") else kinds.get(path.name, other)
    return lambda content: validate(model, content, str(path))


FILES = sorted(
    path
    for pattern in (
        "jobs/configs/**/*.yaml", "cluster/*.yaml", "serve/*.yaml", "platform/embedloom/synthesis/prompts/*.yaml",
    )
    for path in ROOT.glob(pattern)
    if path.name != "alerts.yaml"  # Prometheus reads it: tests/cluster/test_alerts.py
)  # fmt: skip


def is_own(path: tuple[str | int, ...]) -> bool:
    """Whether the keys below are the user's: a run's stages and their sources are mappings by name, too."""
    return path[-1:] != () and (
        path[-1] in OWN_KEYS or (path[-1] in ("stages", "sources") and "runs" in path)
    )


def keys_of(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all keys that have one right spelling."""
    if isinstance(node, dict):
        for key, value in node.items():
            if not is_own(path):
                yield (*path, key)
            # What stands below a prompt's field is a JSON schema, which xgrammar reads.
            if path[-1:] != ("fields",) and key not in PATHS:
                yield from keys_of(value, (*path, key))
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from keys_of(item, (*path, index))


def misspelt(key: str) -> Iterator[str]:
    """Two letters swapped, and one letter too many."""
    swap = next((i for i in range(len(key) - 2, -1, -1) if key[i] != key[i + 1]), None)
    if swap is not None:
        yield key[:swap] + key[swap + 1] + key[swap] + key[swap + 2 :]
    middle = len(key) // 2
    yield key[:middle] + key[middle] + key[middle:]


def with_typo(content: dict[str, Any], path: tuple[str | int, ...], typo: str) -> dict[str, Any]:
    """The content with one key spelt otherwise, at its place; only what stands above the key is copied."""
    changed = copy.copy(content)
    node: Any = changed
    for part in path[:-1]:
        node[part] = copy.copy(node[part])
        node = node[part]
    items = [(typo if key == path[-1] else key, value) for key, value in node.items()]
    node.clear()
    node.update(items)
    return changed


def complaint(load: Load, content: dict[str, Any], path: tuple[str | int, ...], typo: str) -> str | None:
    """What is wrong with the answer to a typo; None if it is right."""
    where = ".".join(map(str, (*path, typo)))
    try:
        load(with_typo(content, path, typo))
    except ConfigError as error:
        right = f"nearest valid key is {path[-1]!r}"
        if error.exit_code == 2 and right in str(error) and typo in str(error):
            return None
        return f"{where}: {error}"
    return f"{where}: accepted"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_misspelt_key_is_named_with_the_right_one(path):
    content = yaml.safe_load(path.read_text())
    check = partial(complaint, loader(path), content)
    loader(path)(content)  # as it stands it is accepted
    keys = list(keys_of(content))
    assert keys
    found = [check(where, typo) for where in keys for typo in misspelt(str(where[-1]))]
    assert [line for line in found if line] == []


def test_the_files_are_found():
    names = {str(path.relative_to(ROOT)) for path in FILES}
    assert {
        "jobs/configs/quickstart.yaml", "jobs/configs/nemotron_8b.yaml", "cluster/cluster.yaml", "serve/config.yaml",
        "cluster/runtime_env.yaml", "platform/embedloom/synthesis/prompts/bitext.yaml",
    } <= names  # fmt: skip
