"""``embedloom serve MODEL --corpus VECTORS``: an endpoint for any model, without a run config."""

from pathlib import Path
from typing import Any

from embedloom.cluster.config import ClusterConfig
from embedloom.config.base import apply_overrides, validate
from embedloom.config.serving import ServingConfig
from embedloom.encoder.registry import check_model_name, open_model, resolve_model
from embedloom.model_folder import ModelFolder
from embedloom.preflight import check_port
from embedloom.progress import note


def serving_config(given: dict[str, Any], overrides: list[str]) -> ServingConfig:
    """The serving section that the command line describes.

    Args:
        given: keys of the section by name; None where the user said nothing.
        overrides: ``key=value`` items of the section, such as ``max_items=64``.

    Raises:
        ConfigError: naming the key, the value seen and what is allowed.
    """
    content = {key: value for key, value in given.items() if value is not None}
    items = [item.removeprefix("serving.") for item in overrides]
    return validate(ServingConfig, apply_overrides(content, items), "serve")


def gate_rule(config: ServingConfig, model: ModelFolder) -> ServingConfig:
    """Whether this model must have passed the gate: what the user says, else only a model that a run trained.

    A foreign model named by hand has no run that could have judged it.
    """
    stated = {"require_gate", "verdict"} & config.model_fields_set
    if stated or model.is_artefact:
        return config
    note(
        "serve",
        f"{config.model} comes from no run and has not been gated; serving.require_gate=true refuses such models",
    )
    return config.model_copy(update={"require_gate": False})


def serve_model(config: ServingConfig, cluster: ClusterConfig, profile: str, dry_run: bool) -> str:
    """Serve ``config.model`` until interrupted; returns what to print.

    Raises:
        DataError, ConfigError: a model, corpus or settings that cannot be used.
        ServeError: the endpoint did not start.
    """
    check_model_name(config.model, "MODEL")
    machine = cluster.profile(profile)
    check_port(config, machine)
    name = config.served_name or Path(config.model).expanduser().absolute().name
    url = f"http://{config.host}:{config.port}{config.route_prefix.rstrip('/')}"
    if dry_run:
        corpus = f" and search {config.corpus}" if config.corpus else ""
        return f"would serve {config.model} as {name!r}{corpus} at {url}\n{url}"
    model = open_model(resolve_model(config.model, config.trust_remote_code))
    config = gate_rule(config, model)
    from embedloom.cluster.session import ray_session

    with ray_session(machine, cluster.auth) as own_ray:
        # Imports Ray, which reads how to authenticate on its first import: the session has said it by now.
        from embedloom.serving.stage import start_endpoint

        with start_endpoint(
            config, model.path, model.id, name, machine.serve, config.compute_dtype, own_ray
        ) as endpoint:
            endpoint.wait()
    return url
