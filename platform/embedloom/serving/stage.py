"""Starting the endpoint in the connected Ray, waiting until it answers, asking it as a client would, stopping it after a drain."""

import ipaddress
import logging
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import numpy as np
import pyarrow.compute as pc
import ray
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from embedloom.compute.shards import elsewhere, fetch_weights
from embedloom.config.base import validate
from embedloom.config.cluster import PoolConfig, ServeScaling
from embedloom.config.serving import ApplicationArgs, SearchMode, ServingConfig
from embedloom.core.artefacts import Artefact
from embedloom.core.command_output import WORKERS_LOG, current_logs
from embedloom.core.progress import begun, ended, note
from embedloom.core.schemas import check_table
from embedloom.encoder.backbone import DTypeName
from embedloom.encoder.registry import NodeModel, fetched_by_name
from embedloom.errors import ServeError, last_line
from embedloom.retrieval.inputs import DOCUMENTS_FOLDER, SPLITS
from embedloom.retrieval.ledger import VECTORS_FOLDER
from embedloom.retrieval.vector_files import read_vectors
from embedloom.serving.address import ask, remember
from embedloom.serving.app import build_application, build_encoders, named, named_model
from embedloom.serving.applications import (
    APPLICATION,
    GATEWAY,
    QUIET,
    SINGLE,
    ask_ingress,
    remove,
    run,
    running_replicas,
    version_name,
    version_names,
)
from embedloom.serving.listener import ListenerOwner, bound_socket

# Asking the endpoint as a client would, and ranking the run's documents by the answer.


_SHOWN_CHARACTERS = 160


def nearest_documents(
    url: str,
    model: str,
    question: str,
    corpus: Artefact,
    vectors: Artefact,
    count: int = 3,
    timeout_seconds: float = 60,
    task: str | None = None,
) -> str:
    """Embed a question over HTTP and list the nearest documents of the corpus.

    Args:
        url: the endpoint's ``…/v1``.
        model: served model name.
        question: the query.
        corpus: artefact with the documents.
        vectors: artefact with their vectors; its contract must be the endpoint's.
        count: documents listed.
        timeout_seconds: of the request.
        task: a task type, or a task of the model by name; None: the model's default, as for any client.

    Raises:
        ServeError: the endpoint refused or did not answer.
        DataError: the vectors are of another contract than recorded.
    """
    query = np.asarray(_embed(url, model, question, timeout_seconds, task), dtype=np.float32)
    ids, matrix = read_vectors(vectors.place, VECTORS_FOLDER, vectors.manifest["details"]["contract_hash"])
    if matrix.shape[1] < len(query):  # vectors cut to their first dimensions are asked with a query cut alike
        query = query[: matrix.shape[1]] / np.linalg.norm(query[: matrix.shape[1]])
    scores = matrix @ query
    lines = [f"? {question}"]
    for position in np.argsort(-scores, kind="stable")[:count]:
        document = _document(corpus, ids[position])
        text = " ".join(str(document["text"]).split())[:_SHOWN_CHARACTERS]
        lines.append(f"  {scores[position]:.3f}  {document['source']}\n         {text}")
    return "\n".join(lines)


def searched_documents(
    url: str,
    question: str,
    mode: SearchMode,
    count: int = 3,
    timeout_seconds: float = 60,
    task: str | None = None,
) -> str:
    """What the endpoint's own search finds, listed.

    Args:
        url: the endpoint's ``…/v1``.
        question: the query.
        mode: by vectors, words or both.
        count: documents listed.
        timeout_seconds: of the request.
        task: a task type, or a task of the model by name; None: the model's default.

    Raises:
        ServeError: the endpoint refused or did not answer.
    """
    asked = {"query": question, "mode": mode, "top_k": count} | ({} if task is None else {"task": task})
    reply = ask(f"{url}/search", timeout_seconds, asked)
    lines = [f"? {question}  ({reply['mode']})"]
    for hit in reply["results"]:
        text = " ".join(str(hit["text"] or "").split())[:_SHOWN_CHARACTERS]
        lines.append(f"  {hit['score']:.3f}  {hit['source'] or hit['id']}\n         {text}")
    return "\n".join(lines)


def _embed(url: str, model: str, question: str, timeout_seconds: float, task: str | None) -> list[float]:
    asked = {"model": model, "input": question, "input_type": "query"} | (
        {} if task is None else {"task": task}
    )
    return list(ask(f"{url}/embeddings", timeout_seconds, asked)["data"][0]["embedding"])


def _document(corpus: Artefact, document_id: str) -> dict[str, object]:
    for split in SPLITS:
        for name in corpus.place.names(f"{DOCUMENTS_FOLDER}/{split}", ".parquet"):
            table = check_table("documents", corpus.place.read_table(name), name)
            found = table.filter(pc.equal(table.column("id"), document_id))
            if found.num_rows:
                return dict(found.to_pylist()[0])
    raise ServeError(f"document {document_id} has a vector, but is not in the corpus")


_CALL_SECONDS = 5.0  # that the controller may take to answer


@dataclass(slots=True)
class Endpoint:
    """A running endpoint; leaving its ``with`` block stops it."""

    url: str
    served_name: str
    owns_serve: bool
    drain_seconds: float
    own_ray: bool = False  # whether its Ray ends when it does
    listener: ListenerOwner | None = None
    address_file: Path | None = None

    def wait(self) -> None:
        """Say where it answers and block until SIGINT or SIGTERM; call from the main thread, then ``stop``."""
        note("serve", f"{self.served_name} answers at {self.url}/v1; the page is at {self.url}/")
        logs = current_logs()
        if logs is not None:
            note("serve", f"requests, and all that replicas print, are logged in {logs.name}/{WORKERS_LOG}")
        asked = threading.Event()
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, lambda *_: asked.set()) for number in numbers}
        try:
            while not asked.wait(0.1):
                pass
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        note("serve", "stopping: running requests may finish")

    def stop(self) -> None:
        """Let running requests finish for ``drain_seconds``, then take everything down; safe to call twice."""
        if self.address_file is not None:
            self.address_file.unlink(missing_ok=True)
        if ray.is_initialized():
            self._take_down()
        if self.listener is not None:
            self.listener.close()

    def _take_down(self) -> None:
        try:
            self._drain()
            if self.own_ray:
                return  # to take Serve down in order first takes up to ten seconds more on a busy machine
            if self.owns_serve:
                serve.shutdown()
                return
            remove_all()
        except (ray.exceptions.RayError, RayServeException, ServeError, TimeoutError) as error:
            note("serve", f"Serve did not end in order ({last_line(error)}); it ends with its Ray")

    def _drain(self) -> None:
        """Have new requests refused (503) and wait for those in hand; nothing where no endpoint runs yet."""
        if not any(running_replicas(APPLICATION, name) for name in (SINGLE, GATEWAY)):
            return
        late = sum(ask_ingress("drain", self.drain_seconds + _CALL_SECONDS, self.drain_seconds))
        if late:
            note(
                "serve",
                f"{late} requests were not done within {self.drain_seconds:g} s, and were answered 503",
            )

    def __enter__(self) -> "Endpoint":
        """The endpoint itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self.stop()


def _session_folder(own_ray: bool) -> str:
    """The folder of the Ray that this process started for itself, which its processes have in their command lines; else empty."""
    if not own_ray:
        return ""
    socket_path = Path(ray.nodes()[0]["RayletSocketName"])  # FOLDER/session_…/sockets/raylet
    return str(socket_path.parents[2])


def remove_all() -> None:
    """Let running requests finish and take the endpoint of the connected Ray down, with the versions beside it."""
    for name in (APPLICATION, *version_names()):
        remove(name)


def start_endpoint(
    config: ServingConfig,
    model: Path | NodeModel,
    model_id: str,
    served_name: str,
    scaling: ServeScaling,
    dtype: DTypeName | None = None,
    own_ray: bool = False,
    reranker_scaling: ServeScaling | None = None,
    search_scaling: ServeScaling | None = None,
) -> Endpoint:
    """Serve a model folder over HTTP from the Ray this process is connected to.

    Args:
        config: the serving section.
        model: a folder that every node sees, or a model by name.
        model_id: what identifies the weights; shown by ``/v1/models`` as fingerprint.
        served_name: the name clients put into ``model``.
        scaling: replicas and what each reserves.
        dtype: compute type; None: the section's own.
        own_ray: whether this process ends its Ray when the endpoint is stopped.
        reranker_scaling: the same of the reranker, if one is served; None: as ``scaling``.
        search_scaling: replicas that search the corpus; None: the processes that answer HTTP do.

    Returns:
        The endpoint, ready to answer.

    Raises:
        ConfigError: the port is in use, or the host cannot be listened on.
        DataError: the folder is not a model folder.
        ServeError: the application did not come up.
    """
    if dtype is not None:
        config = config.model_copy(update={"compute_dtype": dtype})
    pools = {"scaling": scaling, "reranker_scaling": reranker_scaling, "search_scaling": search_scaling}
    arguments = _arguments(model, model_id, served_name, {"serving": config, **pools})
    encoders = _encoder_names(arguments)
    build_application(arguments, encoders)  # checked before anything is opened
    for one in (arguments, *arguments.further.values()):
        _fetch(named(one), one.scaling)
    owns_serve = not _serve_is_running()
    listener = _opened(config, scaling, own_ray) if owns_serve else None
    if listener is not None:
        arguments = arguments.model_copy(update={"listener": listener.path})
    url = _url(config)
    endpoint = Endpoint(url, served_name, owns_serve, scaling.drain_seconds, own_ray, listener)
    if warning := scaling.cut_off(config.request_timeout_seconds):
        note("serve", warning)
    try:
        _start(arguments, build_application(arguments, encoders), encoders, endpoint)
        gcs = ray.get_runtime_context().gcs_address
        endpoint.address_file = remember(config.port, url, gcs, served_name, _session_folder(own_ray))
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        endpoint.stop()
        raise ServeError(f"the endpoint did not start: {last_line(error)}") from error
    except BaseException:
        endpoint.stop()
        raise
    return endpoint


def _url(config: ServingConfig) -> str:
    """Where this machine's clients ask."""
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    return f"http://{host}:{config.port}{config.route_prefix.rstrip('/')}"


def _encoder_names(arguments: ApplicationArgs) -> dict[str, str] | None:
    """New names for the applications of encoders, by model; None where the endpoint's only process is one."""
    if arguments.single:
        return None
    models = {arguments.served_name: arguments, **arguments.further}
    return {name: version_name(one.fingerprint) for name, one in models.items()}


def _arguments(
    model: Path | NodeModel, model_id: str, served_name: str, asked: dict[str, Any]
) -> ApplicationArgs:
    """What the application is built from; ``asked`` are its sections."""
    content: dict[str, Any] = {
        **named_model(model),
        "model_id": model_id,
        "served_name": served_name,
        "on_loopback": _on_loopback(asked["serving"].host),
    }
    return validate(ApplicationArgs, {**content, **asked}, "serving")


def _fetch(model: Path | NodeModel, scaling: ServeScaling) -> None:
    """Have the model on the nodes that replicas may run on."""
    pool = PoolConfig(cpus=scaling.cpus, gpus=scaling.gpus, start_seconds=scaling.start_seconds)
    fetch_weights("serve", elsewhere(fetched_by_name(model)), pool)


def _opened(config: ServingConfig, scaling: ServeScaling, own_ray: bool) -> ListenerOwner | None:
    """The socket to lend, or None where Serve's proxy is to listen; either way the address is free.

    Lent only in a Ray that this command started for itself: there no node joins later, which could not be lent it, and
    no Serve without a proxy outlives a killed command.

    Raises:
        ConfigError: it is not.
    """
    if own_ray and not scaling.haproxy and _is_alone():
        return ListenerOwner(config.host, config.port)
    check_port_free(config.host, config.port)
    return None


def _start(
    arguments: ApplicationArgs, application: Application, encoders: dict[str, str] | None, endpoint: Endpoint
) -> None:
    """Start Serve, the encoders where they are an application of their own, and what answers HTTP, until it does."""
    begun("serve", f"starting {endpoint.served_name}")
    started = time.monotonic()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serving = arguments.serving
    serve.start(
        proxy_location="HeadOnly" if arguments.listener is None else "Disabled",
        http_options={"host": serving.host, "port": serving.port},
        logging_config=QUIET,
    )
    models = {arguments.served_name: arguments, **arguments.further}
    for name, applied in (encoders or {}).items():
        run(build_encoders(models[name]), applied, None, models[name].scaling.start_budget)
    run(application, APPLICATION, serving.route_prefix, arguments.scaling.start_budget)
    _wait_until_ready(endpoint, arguments.scaling.start_budget)
    ended("serve", time.monotonic() - started, {}, "ready")


def _on_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_port_free(host: str, port: int) -> None:
    """Raise ConfigError if nothing could listen on the address now."""
    bound_socket(host, port).close()


def _is_alone() -> bool:
    """Whether this machine is all of the cluster, so that every replica can be lent a socket."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return len(nodes) == 1 and nodes[0]["NodeID"] == ray.get_runtime_context().get_node_id()


def _serve_is_running() -> bool:
    """Whether this cluster already has a Serve controller (then its HTTP address is not ours to choose)."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def _wait_until_ready(endpoint: Endpoint, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    seen = "no answer"
    while time.monotonic() < deadline:
        status, reply = _get(f"{endpoint.url}/ready")
        if status == 200 and reply.get("model") == endpoint.served_name:
            return
        seen = f"status {status}: {reply}" if status else "no connection"
        time.sleep(0.2)
    raise ServeError(f"{endpoint.url}/ready did not become ready within {seconds:g} s ({seen})")


def _get(url: str) -> tuple[int, dict[str, Any]]:
    try:
        # No proxy: the endpoint is on this machine, whatever http_proxy says.
        reply = httpx.get(url, timeout=10, trust_env=False, verify=False)
        return reply.status_code, reply.json()
    except (httpx.HTTPError, ValueError):
        return 0, {}
