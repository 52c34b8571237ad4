"""A new version of the model in a running endpoint: started beside it, checked, tried, and promoted or taken away.

The endpoint's own process routes (versions.py) and counts; this side starts and stops applications and decides
(trial.py). What becomes of the endpoint is what a fresh `embedloom serve` of the new model would be.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ServeDeploySchema

from embedloom.config.base import validate
from embedloom.config.cluster import ServeScaling
from embedloom.config.serving import ApplicationArgs
from embedloom.core.model_folder import ModelFolder
from embedloom.core.progress import begun, ended, note
from embedloom.core.prompting import PromptContract
from embedloom.errors import ConfigError, ServeError
from embedloom.serving.app import build_application, build_encoders, named_model
from embedloom.serving.applications import (
    APPLICATION,
    ask_ingress,
    declare,
    declared,
    ingress_handle,
    remove,
    run,
    version_name,
    version_names,
)
from embedloom.serving.gateway import ENCODERS
from embedloom.serving.messages import ModelInfo
from embedloom.serving.rollout.golden import check_golden, expected_vectors
from embedloom.serving.rollout.router import TrialOrders
from embedloom.serving.rollout.trial import Decision, TrialRules, Window, decide

_CALL_SECONDS = 120.0
_SILENT_SECONDS = 60.0  # how long an endpoint that was killed may take to come back
_ASK_SECONDS = 1.0  # between two looks at the window; well below the lease of a trial


@dataclass(frozen=True, slots=True)
class DeployRequest:
    """What is deployed, and how carefully."""

    model: ModelFolder
    rules: TrialRules
    corpus: str | None = None
    documents: str | None = None
    share: float = 0.1
    shadow: bool = False
    new_vectors: bool = False  # clients embed their corpora again, so the two versions' vectors never meet
    stay: bool = False  # never promote
    require_gate: bool | None = None  # None: as the endpoint was started
    verdict: str | None = None  # the gate's, where it is not beside the weights


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of it."""

    promoted: bool
    reason: str
    window: Window


def successor(request: DeployRequest, live: ApplicationArgs, info: ModelInfo) -> ApplicationArgs:
    """The endpoint's arguments with the new model.

    Raises:
        ConfigError: its vectors would meet those of another contract, or a corpus of the old model.
        DataError: no model folder.
    """
    contract = request.model.contract
    if contract.hash != info.contract_hash and not request.new_vectors:
        raise ConfigError(
            f"{request.model.path}: its contract is {contract.hash}, the endpoint's {info.contract_hash}{_prompts_differ(contract, info)}; "
            "every vector that clients hold would be useless. If they will embed their corpora again: --new-vectors"
        )
    same_weights = request.model.id == live.fingerprint
    if live.serving.corpus is not None and request.corpus is None and not same_weights:
        raise ConfigError(
            f"--corpus: this endpoint searches {live.serving.corpus}, embedded by the model that is replaced; "
            "embed it with the new one and name the vectors"
        )
    # The live model's permission is not the new one's.
    changes: dict[str, Any] = {
        "model": named_model(request.model.travels)["model_folder"],
        "verdict": request.verdict,
        "trust_remote_code": request.model.is_trusted,
    }
    if request.corpus is not None:
        changes |= {"corpus": request.corpus, "documents": request.documents}
    if request.require_gate is not None:
        changes["require_gate"] = request.require_gate
    content = {
        **live.model_dump(mode="json"),
        **named_model(request.model.travels),
        "model_id": request.model.id,
        "serving": {**live.serving.model_dump(mode="json"), **changes},
    }
    return validate(ApplicationArgs, content, "deploy")


def _prompts_differ(contract: PromptContract, info: ModelInfo) -> str:
    """A task type whose default instruction is another, the default one first, with both; empty where all are alike."""
    for kind in (contract.task_type_of(), *contract.instructions):
        text = contract.instructions.get(kind)
        if info.instructions.get(kind, text) != text:
            return f" (the instruction of {kind} is {text!r} there, {info.instructions[kind]!r} here)"
    return ""


def deploy(request: DeployRequest) -> Outcome:
    """Deploy into the endpoint of the Ray this process is connected to.

    Raises:
        ConfigError, DataError: the new model cannot take the old one's place; nothing was started.
        ServeError: no endpoint, the new version did not start, or fails its golden vectors; the old one answers on.
    """
    ingress = ingress_handle()
    blueprint, info, applications = ingress.describe_endpoint.remote().result(timeout_s=_CALL_SECONDS)
    live = validate(ApplicationArgs, blueprint, "the running endpoint")
    config = declared()
    if config is not None:
        check_in_place(request, live)
    new = successor(request, live, info)
    build_application(
        new, applications or None
    )  # gate, contract and corpus are checked before anything starts
    for name in version_names():
        if name not in applications.values():  # left by a deploy that was killed
            remove(name)
    name = version_name(new.fingerprint)
    begun("deploy", f"starting {request.model.path} beside the live version")
    started = time.monotonic()
    # What Serve will replace in place is tried with one replica; what takes over as it is needs all of them.
    tried = new if config is None else new.model_copy(update={"scaling": _smallest(new.scaling)})
    try:
        run(build_encoders(tried), name, None, new.scaling.start_budget)
        _golden(new, name, request.model.path)
        ended("deploy", time.monotonic() - started, {}, "started")
        begun("deploy", "watching")
        decision, window = _watch(_orders(request, new, name), request.rules)
        ended("deploy", time.monotonic() - started, {}, "watched")
    except BaseException:
        _withdraw(name)
        raise
    if decision.action != "promote" or request.stay:
        _withdraw(name)
        return Outcome(False, decision.reason, window)
    if config is None:
        _promote(live, new, name, applications)
    else:
        _promote_in_place(config, new, name)
    return Outcome(True, decision.reason, window)


def _orders(request: DeployRequest, new: ApplicationArgs, name: str) -> TrialOrders:
    # Where vectors of the two versions must not meet, no client may get the new one's before all do.
    shadow = request.shadow or request.new_vectors
    return TrialOrders(
        version=f"{new.fingerprint}:{name}",
        application=name,
        share=0.0 if shadow else request.share,
        shadow=shadow,
        same_space=not request.new_vectors,
    )


def _golden(new: ApplicationArgs, name: str, folder: Path) -> None:
    handle = serve.get_deployment_handle(ENCODERS, name)
    expected, dtype = expected_vectors(folder)
    # Serve spreads calls over replicas, so a few rounds reach each of them, most likely.
    for _ in range(max(1, new.scaling.min_replicas)):
        lowest = check_golden(
            lambda job: handle.encode.remote(job).result(timeout_s=_CALL_SECONDS),
            expected,
            dtype,
            new.compute_dtype,
        )
    note("deploy", f"golden vectors agree (lowest cosine {lowest:.6f})")


def _watch(
    orders: TrialOrders,
    rules: TrialRules,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Decision, Window]:
    """Renew the trial and judge its window until something follows from it."""
    started = heard = clock()
    told = ""
    while True:
        try:
            window = Window.merged(ask_ingress("order_trial", _CALL_SECONDS, orders.model_dump(mode="json")))
            heard = clock()
        except (ray.exceptions.RayError, ServeError, TimeoutError) as error:
            if clock() - heard > _SILENT_SECONDS:
                raise ServeError(f"the endpoint has been silent for {_SILENT_SECONDS:g} s") from error
            time.sleep(_ASK_SECONDS)
            continue
        decision = decide(window, rules, clock() - started)
        if decision.action != "continue":
            return decision, window
        if window.summary() != told:
            told = window.summary()
            note("deploy", f"{decision.reason}: {told}")
        time.sleep(_ASK_SECONDS)


def _withdraw(name: str) -> None:
    """Everything back to the live version."""
    try:
        ask_ingress("end_trial", _CALL_SECONDS)
    except (ray.exceptions.RayError, ServeError, TimeoutError):
        note("deploy", "the endpoint did not answer; its trial ends by itself")
    remove(name)


def check_in_place(request: DeployRequest, live: ApplicationArgs) -> None:
    """Refuse what cannot bear that both versions answer while Serve replaces one by the other.

    Raises:
        ConfigError: vectors of both would meet.
    """
    what = "--new-vectors" if request.new_vectors else "--corpus" if live.serving.corpus is not None else None
    if what is not None:
        raise ConfigError(
            f"{what}: this endpoint comes from a Serve config file, by which Serve replaces its replicas one by one, so that both "
            "versions would answer for a while; start a second endpoint, or change model_folder in the file"
        )


def _smallest(scaling: ServeScaling) -> ServeScaling:
    """One replica of the same kind."""
    return scaling.model_copy(update={"min_replicas": 1, "max_replicas": 1, "idle_to_zero_seconds": None})


def _promote_in_place(config: ServeDeploySchema, new: ApplicationArgs, name: str) -> None:
    """Have Serve replace the endpoint's replicas, a few at a time; the trial's own goes first, to make room.

    Raises:
        ServeError: the new version did not come up; Serve was given the old config again.
    """
    ask_ingress("end_trial", _CALL_SECONDS)
    remove(name)
    stated = new.model_dump(mode="json", exclude_defaults=True)
    changed = config.model_copy(deep=True)
    endpoint = next(one for one in changed.applications if one.name == APPLICATION)
    endpoint.args = stated
    seconds = new.scaling.start_budget * (1 + new.scaling.max_replicas)
    try:
        declare(changed, seconds)
    except ServeError:
        declare(config, seconds)
        raise
    note(
        "deploy",
        f"Serve runs the new version; write model_folder: {new.model_folder} and model_id: {new.model_id} into the Serve config "
        "file, or its next `serve deploy` brings the old one back",
    )


def _promote(live: ApplicationArgs, new: ApplicationArgs, name: str, applications: dict[str, str]) -> None:
    """Replace the endpoint's process by one of the new model; the old one drains when the new one answers.

    Raises:
        ServeError: the new one did not start; the old one was put back.
    """
    ask_ingress("end_trial", _CALL_SECONDS)
    prefix = live.serving.route_prefix
    try:
        run(
            build_application(new, None if new.single else {**applications, live.served_name: name}),
            APPLICATION,
            prefix,
            live.scaling.start_budget,
        )
    except ServeError:
        run(build_application(live, applications or None), APPLICATION, prefix, live.scaling.start_budget)
        remove(name)
        raise
    replaced = name if new.single else applications.get(live.served_name)
    if replaced is not None:
        remove(replaced)
