"""The ``merge-models`` verb: any model folders, without a run config."""

from typing import Annotated

import typer

from embedloom.cli.options import ClusterFile, Verbose, option
from embedloom.errors import ConfigError

Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL...", help="Model folders with safetensors, local, s3:// or gs://."),
]
Out = Annotated[str, option("out", "Folder of the merged model, local, s3:// or gs://.")]
Method = Annotated[
    str,
    option(
        "method",
        "linear, slerp, multislerp, karcher, task_arithmetic, ties, dare_linear, dare_ties or model_stock.",
    ),
]
Weights = Annotated[str | None, option("weights", "One number a model, such as 2,1,1; default: equal.")]
Base = Annotated[
    str | None, option("base", "The model all were trained from; methods on task vectors need it.")
]
Density = Annotated[float | None, option("density", "ties, dare: share of each task vector that is kept.")]
Scale = Annotated[float | None, option("scale", "Factor of the combined task vector.")]
StoredType = Annotated[str, option("dtype", "Of the written tensors: float32, bfloat16 or float16.")]
ProfileName = Annotated[
    str | None, option("profile", "Spread the files over Ray as this profile says; default: threads here.")
]
Allow = Annotated[
    list[str] | None,
    option(
        "allow",
        "A difference that changes nothing, as the refusal names it, such as base; repeatable.",
        metavar="NAME",
    ),
]
Overrides = Annotated[
    list[str] | None,
    option("set", "Another key of the section merging, such as seed=1; repeatable.", metavar="KEY=VALUE"),
]
DryRun = Annotated[bool, option("dry-run", "Check the models, print the plan and stop.")]


def merge_models(
    models: Models,
    out: Out,
    method: Method = "linear",
    weights: Weights = None,
    base: Base = None,
    density: Density = None,
    scale: Scale = None,
    dtype: StoredType = "float32",
    allow: Allow = None,
    profile: ProfileName = None,
    cluster: ClusterFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Any model folders become one, tensor by tensor; a stopped merge continues."""
    from embedloom.core.command_output import command_output
    from embedloom.core.storage import Place
    from embedloom.pipeline.model_commands import merge_folders, merging_config

    given = {
        "method": method, "weights": _numbers(weights), "density": density, "scale": scale, "dtype": dtype,
        "allow": allow,
    }  # fmt: skip
    config = merging_config(given, overrides or [])
    with command_output(Place("runs/merge-models"), verbose or dry_run):
        result = merge_folders(config, models, base, out, cluster, profile, dry_run)
    print(result)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--weights: {text!r}; expected numbers and commas, such as 2,1,1") from error
