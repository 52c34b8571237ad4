"""``embedloom config``: what every key of the config files means, for people and for editors."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel


app = typer.Typer(no_args_is_help=True, help="What the keys of the config files mean.")


class ConfigFile(StrEnum):
    """The kinds of YAML files."""

    run = "run"
    cluster = "cluster"
    ablation = "ablation"
    rates = "rates"
    prompt = "prompt"


_TITLES = {
    ConfigFile.run: "Run config (jobs/configs/*.yaml)",
    ConfigFile.cluster: "Cluster config (cluster/cluster.yaml)",
    ConfigFile.ablation: "Ablation (jobs/configs/ablation_*.yaml)",
    ConfigFile.rates: "Rates (rates.yaml beside the cluster config)",
    ConfigFile.prompt: "Prompt of a generator (embedloom/synthesis/prompts/*.yaml)",
}


def schema_of(file: ConfigFile) -> dict[str, Any]:
    """JSON Schema of one kind of file."""
    from embedloom.config.ablation import AblationConfig
    from embedloom.config.cluster import ClusterConfig
    from embedloom.config.keys import config_schema
    from embedloom.config.rates import RatesConfig
    from embedloom.config.run import RunConfig
    from embedloom.synthesis.prompt import Prompt

    models: dict[ConfigFile, type[BaseModel]] = {
        ConfigFile.run: RunConfig, ConfigFile.cluster: ClusterConfig, ConfigFile.ablation: AblationConfig,
        ConfigFile.rates: RatesConfig, ConfigFile.prompt: Prompt,
    }  # fmt: skip
    return config_schema(models[file], f"embedloom: {_TITLES[file]}")


@app.command("show")
def config_show(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="[KEY]",
            help="A key of any config file, such as mining.selection.margin_ratio or profiles.local.serve.streams.",
        ),
    ] = None,
) -> None:
    """Type, default, allowed values and meaning of a key; without KEY, the sections of every file."""
    from embedloom.config.keys import config_keys, find_keys, key_or_nearest
    from embedloom.config.reference import describe_keys, overview

    files = {file: config_keys(schema_of(file)) for file in ConfigFile}
    if key is None:
        print(overview({_TITLES[file]: keys for file, keys in files.items()}))
        return
    known = {file: found for file, keys in files.items() if (found := find_keys(keys, key))}
    if not known:
        key_or_nearest([one for keys in files.values() for one in keys], key)
    for file, found in known.items():
        print(_TITLES[file])
        print(describe_keys(found, files[file]))


@app.command("schema")
def config_schema_of(
    file: Annotated[
        ConfigFile, typer.Argument(metavar="[FILE]", help="run, cluster, ablation, rates or prompt.")
    ] = ConfigFile.run,
) -> None:
    """JSON Schema of a config file, for editors: `# yaml-language-server: $schema=FILE` in its first line."""
    print(schema_text(file), end="")


@app.command("reference")
def config_reference(
    out: Annotated[Path, typer.Option("--out", help="Folder for config.md and schema/*.json.")] = Path(
        "docs/reference"
    ),
) -> None:
    """Write the reference page of all keys, and the JSON Schemas."""
    from embedloom.config.keys import config_keys
    from embedloom.config.reference import reference_page

    (out / "schema").mkdir(parents=True, exist_ok=True)
    for file in ConfigFile:
        (out / "schema" / f"{file.value}.json").write_text(schema_text(file), encoding="utf-8")
    page = reference_page({_TITLES[file]: config_keys(schema_of(file)) for file in ConfigFile})
    (out / "config.md").write_text(page, encoding="utf-8")
    print(out)


def schema_text(file: ConfigFile) -> str:
    """The JSON Schema as it is printed and written."""
    return json.dumps(schema_of(file), indent=1, ensure_ascii=False) + "\n"
