"""``embedloom deploy MODEL``: find the running endpoint, connect to its Ray, hand over."""

import os
from dataclasses import dataclass

from embedloom.cluster.config import ClusterConfig
from embedloom.config.base import apply_overrides, validate
from embedloom.encoder.registry import check_model_name, open_model, resolve_model
from embedloom.errors import ConfigError
from embedloom.serving.trial import TrialRules


@dataclass(frozen=True, slots=True)
class DeployCommand:
    """The command line."""

    model: str
    share: float
    shadow: bool
    stay: bool
    new_vectors: bool
    corpus: str | None
    documents: str | None
    port: int | None
    rules: TrialRules
    require_gate: bool | None
    verdict: str | None = None
    trust_remote_code: bool = False


def trial_rules(watch_seconds: float, overrides: list[str]) -> tuple[TrialRules, bool | None]:
    """The rules that the command line states, and its word about the gate.

    Raises:
        ConfigError: naming the key, the value seen and what is allowed.
    """
    content = apply_overrides({"watch_seconds": watch_seconds}, overrides)
    gate = content.pop("require_gate", None)
    if gate not in (None, True, False):
        raise ConfigError(f"--set require_gate: {gate!r}; allowed: true, false")
    return validate(TrialRules, content, "deploy"), gate


def deploy_model(
    command: DeployCommand, cluster: ClusterConfig, profile: str, dry_run: bool
) -> tuple[str, int]:
    """Deploy; returns what to print and the exit code.

    Raises:
        ConfigError, DataError: bad input; nothing was started.
        ServeError: no endpoint, or the new version did not start or is not the model it should be.
    """
    check_model_name(command.model, "MODEL")
    machine = cluster.profile(profile)
    where = os.environ.get("RAY_ADDRESS") or machine.address
    if where is None:
        from embedloom.serving.address import find

        address = find(command.port)
        where, url = address.ray_address, address.url
        machine = machine.model_copy(update={"address": where})
    else:
        url = f"the endpoint of {where}"
    how = (
        "copies of requests"
        if command.shadow or command.new_vectors
        else f"{100 * command.share:g} % of requests"
    )
    if dry_run:
        return f"would deploy {command.model} into {url}, on {how}\n{url}", 0
    from embedloom.cluster.session import ray_session

    model = open_model(resolve_model(command.model, command.trust_remote_code))
    with ray_session(machine, cluster.auth):
        # Imports Ray, which reads how to authenticate on its first import: the session has said it by now.
        from embedloom.serving.deploy import DeployRequest, deploy

        # A model that a run trained has a gate to pass, whatever the endpoint was started with.
        own = True if model.is_artefact or command.verdict is not None else None
        request = DeployRequest(
            model, command.rules, command.corpus, command.documents, command.share, command.shadow,
            command.new_vectors, command.stay, own if command.require_gate is None else command.require_gate,
            command.verdict,
        )  # fmt: skip
        outcome = deploy(request)
    word = "promoted" if outcome.promoted else "watched only" if command.stay else "rolled back"
    return f"{word}: {outcome.reason}\n{url}", 0 if outcome.promoted or command.stay else 1
