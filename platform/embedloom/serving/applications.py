"""Serve applications by name: the endpoint, and versions of its model beside it."""

import hashlib
import secrets
import time
from typing import Any

from ray import serve
from ray.serve import Application, RunTarget
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from embedloom.errors import ServeError, last_line

APPLICATION = "embedloom"  # the one that answers HTTP
SINGLE, GATEWAY = "endpoint", "gateway"  # its deployments that do
QUIET = {"log_level": "WARNING", "enable_access_log": False}
_POLL_SECONDS = 0.2


def version_name(fingerprint: str) -> str:
    """A new name for an application with encoders of one model; two of the same model differ."""
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=4).hexdigest()
    return f"{APPLICATION}-{digest}-{secrets.token_hex(2)}"


def version_names() -> list[str]:
    """Applications of ``version_name`` that run."""
    return [name for name in serve.status().applications if name.startswith(f"{APPLICATION}-")]


def run(application: Application, name: str, route_prefix: str | None, seconds: float) -> None:
    """Start an application, or replace a running one replica by replica, and wait until all of it is in place.

    Args:
        application: what to start.
        name: its name.
        route_prefix: where it answers HTTP; None: nowhere.
        seconds: it may take: nodes that are bought, weights that are loaded, see ``ServeScaling.start_budget``.

    Raises:
        ServeError: it did not start, or not in time; a replaced one goes on with its old replicas.
    """
    target = RunTarget(application, name=name, route_prefix=route_prefix, logging_config=QUIET)
    serve.run_many([target], wait_for_applications_running=False)
    _wait(name, seconds)


def _wait(name: str, seconds: float) -> None:
    """Wait until all of an application is in place; see ``run``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = serve.status().applications.get(name)
        if found is not None and found.status == "RUNNING" and all(map(_settled, found.deployments.values())):
            return
        if found is not None and found.status == "DEPLOY_FAILED":
            reasons = [deployment.message for deployment in found.deployments.values() if deployment.message]
            # Serve wraps a replica's whole traceback into its message.
            raise ServeError(f"{name} did not start: {last_line(reasons[0] if reasons else found.message)}")
        time.sleep(_POLL_SECONDS)
    raise ServeError(
        f"{name} did not start within {seconds:g} s (serve.start_seconds); is there room for another replica?"
    )


def declared() -> ServeDeploySchema | None:
    """What a Serve config file says, where it is one that started the endpoint; None where a command did."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    applications = client.get_serve_details()["applications"]
    found = [one["deployed_app_config"] for one in applications.values() if one.get("deployed_app_config")]
    if not any(one["name"] == APPLICATION for one in found):
        return None
    return ServeDeploySchema(applications=[ServeApplicationSchema.model_validate(one) for one in found])


def declare(content: ServeDeploySchema, seconds: float) -> None:
    """Give Serve a config as `serve deploy` does, and wait until the endpoint is what it says.

    Raises:
        ServeError: see ``run``.
    """
    _get_global_client().deploy_apps(content)
    _wait(APPLICATION, seconds)


def remove(name: str) -> None:
    """Let an application's running requests finish and take it down; harmless where there is none."""
    if name in serve.status().applications:
        serve.delete(name)


def ingress_handle() -> DeploymentHandle:
    """A handle of the deployment that answers HTTP.

    Raises:
        ServeError: there is none.
    """
    try:
        deployments = serve.status().applications[APPLICATION].deployments
        name = next(name for name in (SINGLE, GATEWAY) if name in deployments)
    except (KeyError, StopIteration, RayServeException) as error:
        raise ServeError("no endpoint runs in this Ray; start one with `embedloom serve`") from error
    return serve.get_deployment_handle(name, APPLICATION)


def ask_ingress(method: str, seconds: float, *arguments: Any) -> list[Any]:
    """What each process that answers HTTP says to a call.

    Raises:
        ServeError: there is none.
        TimeoutError: one did not answer in time.
    """
    handle = ingress_handle()
    if running_replicas(APPLICATION, handle.deployment_name) > 1:
        return list(handle.broadcast(method, *arguments).results(timeout_s=seconds))
    return [getattr(handle, method).remote(*arguments).result(timeout_s=seconds)]


def running_replicas(application: str, deployment: str) -> int:
    """Replicas that are up, as Serve's controller says; 0 where there is no such deployment."""
    found = serve.status().applications.get(application)
    state = found.deployments.get(deployment) if found is not None else None
    counts = state.replica_states if state is not None else {}
    return sum(count for name, count in counts.items() if str(getattr(name, "value", name)) == "RUNNING")


def _settled(deployment: Any) -> bool:
    """No replica is starting or stopping."""
    return all(str(getattr(state, "value", state)) == "RUNNING" for state in deployment.replica_states)
