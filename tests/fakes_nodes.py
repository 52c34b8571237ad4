"""Two Ray nodes that share files and no cache: run as a program, in an environment of its own.

``prepare`` writes what makes a node's Python processes their own: a hub that copies folders, and a hook that hides the other
node's cache, as another machine would.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedloom.core.storage import Place

COMMIT = "c" * 40
SITE = '''
"""A hub without a network, and another machine's cache out of sight."""
import os, shutil, sys
from pathlib import Path

HUB, HIDDEN = os.environ["FAKE_HUB"], os.environ.get("HIDDEN_CACHE")

def see(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and HIDDEN and str(arguments[0]).startswith(HIDDEN):
        raise FileNotFoundError(f"{arguments[0]}: on another machine")

def fetch(name, revision=None, allow_patterns=None, cache_dir=None, **_):
    commit = revision or "%s"
    folder = Path(cache_dir) / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    if not snapshot.exists():
        shutil.copytree(Path(HUB) / name, snapshot)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
    return str(snapshot)

sys.addaudithook(see)
import huggingface_hub
huggingface_hub.snapshot_download = fetch
'''


def prepare(folder: Path) -> Path:
    """The folder that goes first on PYTHONPATH."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(SITE % COMMIT)
    return folder


def node_environment(folder: Path, hidden: Path | None) -> dict[str, str]:
    """HOME and cache of one node, both empty; ``hidden`` is the cache it must not see."""
    (folder / "home").mkdir(parents=True)
    found = {"HOME": str(folder / "home"), "EMBEDLOOM_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
    return found if hidden is None else {**found, "HIDDEN_CACHE": str(hidden)}


def main(folder: Path) -> None:
    """Mine, rescore, embed, evaluate and serve on the second node models that only the first has fetched."""
    import ray
    from ray.cluster_utils import Cluster

    from embedloom.cluster.session import ensure_token, set_ray_environment
    from embedloom.config.cluster import AuthConfig

    auth = AuthConfig(token_path=str(folder / "token"))
    set_ray_environment(auth)
    ensure_token(auth)
    Path(os.environ["RAY_TMPDIR"], "ray").mkdir(exist_ok=True)  # where Ray notes the newest cluster's address
    cluster = Cluster(shutdown_at_exit=True)
    own = {
        "temp_dir": f"{os.environ['RAY_TMPDIR']}/ray",
        "object_store_memory": 100 * 2**20,
        "include_dashboard": False,
    }
    cluster.add_node(num_cpus=8, num_gpus=0, **own)
    second = node_environment(folder / "second", Path(os.environ["EMBEDLOOM_CACHE"]))
    cluster.add_node(num_cpus=8, num_gpus=1, env_vars=second, **own)
    ray.init(address=cluster.address, logging_level="ERROR")
    try:
        print(json.dumps(results(folder)), file=sys.__stdout__)
    finally:
        ray.shutdown()
        cluster.shutdown()


def results(folder: Path) -> dict[str, object]:
    """What each kind of actor made, as counts."""
    from embedloom.config.cluster import PoolConfig
    from embedloom.config.embedding import EmbeddingConfig
    from embedloom.config.evaluation import EvaluationConfig, EvaluationTask
    from embedloom.config.mining import MiningConfig
    from embedloom.core.artefacts import ArtefactWriter
    from embedloom.core.storage import Place
    from embedloom.encoder.registry import NodeModel, open_model
    from embedloom.evaluation.stage import evaluate
    from embedloom.mining.rescore import rescore
    from embedloom.mining.stage import mine, rescoring_source, teacher_sources
    from embedloom.retrieval.corpora import embed_artefact
    from fakes_evaluation import make_corpus as make_heldout
    from fakes_mining import make_corpus, make_synthesis, pair_row, random_documents

    def out(name: str, kind: str) -> ArtefactWriter:
        return ArtefactWriter(Place(str(folder / name)), kind, "config", {}, "local")

    gpu = PoolConfig(gpus=1, cpus=1)
    documents = random_documents(12)
    pairs = [pair_row(f"n{n:02d}", f"query {n}", documents[n]["id"]) for n in range(8)]
    corpus, synthesis = (
        make_corpus(folder / "corpus", documents),
        make_synthesis(folder / "synthesis", pairs),
    )
    mining = MiningConfig.model_validate(
        {
            "teachers": [{"model": "org/tiny"}, {"model": "minilm-l6", "engine": "sentence_transformers"}],
            "top_k": 6,
            "selection": {"negatives": 2, "margin_ratio": 1.0},
            "rescoring": {"model": "org/cross", "top": 3, "max_tokens": 64},
        }
    )
    mined = mine(mining, corpus, [synthesis], teacher_sources(mining), gpu, out("mining", "mining"))
    again = rescore(mining, mined, corpus, rescoring_source(mining), gpu, out("rescored", "rescoring"))
    model = NodeModel.of("org/tiny")
    vectors = embed_artefact(
        EmbeddingConfig(model="org/tiny"), corpus.place.uri, open_model(model), gpu, out("vectors", "vectors")
    )
    evaluation = evaluate(
        EvaluationConfig(tasks=(EvaluationTask(name="heldout"),), baselines=("teacher",)),
        make_heldout(folder / "heldout"),
        {"base": model},
        ("org/tiny", model),
        gpu,
        out("evaluation", "evaluation"),
        "float32",
    )
    return {
        "devices": devices(),
        "shared": shared(folder, corpus.place, Path(os.environ["EMBEDLOOM_CACHE"])),
        "mined": mined.counts["rows"],
        "rescored": again.counts["rows"],
        "vectors": vectors.counts["rows"],
        "scores": evaluation.counts["scores"],
        "served": served_dimension(folder),
    }


def shared(folder: Path, corpus: "Place", first_cache: Path) -> int:
    """Vectors of two actors that share a GPU, once the weights' files are gone from every node."""
    import ray

    from embedloom.config.cluster import PoolConfig
    from embedloom.encoder.registry import NodeModel
    from embedloom.retrieval.embed import TextColumns, embed_corpus
    from embedloom.retrieval.embedder import EncoderSource, share_weights

    pool = PoolConfig(min_actors=2, max_actors=2, gpus=0.5, cpus=1)
    source = share_weights(EncoderSource("tiny", NodeModel.of("org/tiny"), dtype="float32"), pool)
    ray.wait([source.weights], fetch_local=False)
    caches = (first_cache, folder / "second" / "cache")
    files = [path for cache in caches for path in cache.rglob("models--org--tiny/**/*.safetensors")]
    assert len(files) >= 2, files
    for path in files:
        path.rename(f"{path}.gone")
    try:
        done = embed_corpus(
            stage="shared", source=corpus, source_folder="documents/train", output=corpus.child("shared"),
            done_folder="vectors", model=source, side="document", pool=pool, shard_rows=3,
            columns=TextColumns(texts=("text",)),
        )  # fmt: skip
    finally:
        for path in files:
            Path(f"{path}.gone").rename(path)
    return done["rows"]


def devices() -> list[tuple[str | None, str, str]]:
    """What a task sees and takes on a node with a GPU, without and with one of its own, where torch sees a device anyway."""
    import ray

    def seen() -> tuple[str | None, str, str]:
        from unittest import mock

        import torch

        from embedloom.encoder.backbone import pick_device
        from embedloom.retrieval.search import pick_engine

        with mock.patch.object(torch.cuda, "is_available", return_value=True):
            return os.environ.get("CUDA_VISIBLE_DEVICES"), str(pick_device()), pick_engine("auto")

    (second,) = (node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU"))
    there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(second, soft=False)
    task = ray.remote(num_cpus=1, scheduling_strategy=there)(seen)
    return [seen(), ray.get(task.remote()), ray.get(task.options(num_gpus=1).remote())]


def served_dimension(folder: Path) -> int:
    """Length of the vector that a replica on the second node answers with."""
    import socket

    import httpx

    from embedloom.config.cluster import ServeScaling
    from embedloom.config.serving import ServingConfig
    from embedloom.encoder.registry import NodeModel
    from embedloom.serving.stage import start_endpoint

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ServingConfig(port=port, require_gate=False, compute_dtype="float32")
    scaling = ServeScaling(gpus=1, cpus=1, threads=1)
    with start_endpoint(config, NodeModel.of("org/tiny"), "f00d", "tiny", scaling) as endpoint:
        asked = {"model": "tiny", "input": "a text"}
        reply = httpx.post(f"{endpoint.url}/v1/embeddings", json=asked, timeout=120, trust_env=False)
        return len(reply.json()["data"][0]["embedding"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
