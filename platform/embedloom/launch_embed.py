"""``embedloom embed INPUT --model MODEL --out FOLDER``: vectors of any texts, without a run config."""

import os
from pathlib import Path
from typing import Any

from embedloom.artefacts import Artefact, ArtefactWriter, fingerprint
from embedloom.cluster.config import ClusterConfig, Profile, load_cluster
from embedloom.config.base import apply_overrides, validate
from embedloom.config.resources import PoolConfig, StageResources
from embedloom.config.shipped import SHIPPED_CLUSTER, cluster_file
from embedloom.config.use import EmbeddingConfig
from embedloom.encoder.registry import check_model_name, open_model, resolve_model
from embedloom.progress import begun, ended, note
from embedloom.retrieval.inputs import input_state
from embedloom.retrieval.previous import set_aside
from embedloom.storage import Place


def embedding_config(given: dict[str, Any], overrides: list[str]) -> EmbeddingConfig:
    """The embedding section that the command line describes.

    Args:
        given: keys of the section by name; None where the user said nothing.
        overrides: ``key=value`` items of the section, such as ``shard_rows=512`` or ``index.neighbours=64``.

    Raises:
        ConfigError: naming the key, the value seen and what is allowed.
    """
    content = {key: value for key, value in given.items() if value is not None}
    if "index" in content:
        content["index"] = {"kind": content["index"]}
    items = [item.removeprefix("embedding.") for item in overrides]
    return validate(EmbeddingConfig, apply_overrides(content, items), "embed")


def load_machine(given: Path | None) -> ClusterConfig:
    """The cluster config of a command without a run config.

    Where only the shipped one is found, its profile ``local`` is this machine with one actor on all its cores: there is
    no recipe whose timing hangs on two of them.

    Raises:
        ConfigError: a file that was named is missing or broken.
    """
    path = cluster_file(given)
    cluster = load_cluster(path)
    if path != SHIPPED_CLUSTER:
        return cluster
    cores = os.cpu_count() or 1
    pool = PoolConfig(threads=cores)
    machine = Profile(logical_cpus=max(4, cores), stages=StageResources(embedding=pool))
    return cluster.model_copy(update={"profiles": {**cluster.profiles, "local": machine}})


def embed_texts(
    config: EmbeddingConfig, out: str, cluster: ClusterConfig, profile: str, dry_run: bool
) -> str:
    """Embed ``config.corpus`` with ``config.model`` into the folder ``out``; returns what to print.

    Finished vectors of the same input, model and settings are left as they are; an interrupted build goes on; a
    changed input embeds what is new.

    Raises:
        DataError, ConfigError: input, model or settings that cannot be used.
    """
    corpus, place = str(config.corpus), Place(out)
    check_model_name(config.model, "--model")
    states = input_state(corpus)
    machine = cluster.profile(profile)
    if dry_run:
        pool = machine.stages.embedding
        return f"would embed {corpus} with {config.model} as {config.dtype}, up to {pool.max_actors} actors x {pool.cpus:g} CPU\n{place.uri}"
    model = open_model(resolve_model(config.model, config.trust_remote_code))
    settings = config.model_dump(mode="json", exclude={"previous", "corpus", "model"})
    inputs = {"corpus": fingerprint(states), "model": model.id}
    wanted = fingerprint("vectors", fingerprint(settings), inputs)
    finished = Artefact.find(place, wanted)
    if finished is not None:
        note("embed", "finished, skipped")
        return place.uri
    set_aside(place, wanted, config.previous)
    writer = ArtefactWriter(place, "vectors", fingerprint(settings), inputs, profile)
    begun("embed", "continuing an interrupted build" if writer.resumed else "building")
    from embedloom.cluster.session import ray_session

    with ray_session(machine, cluster.auth):
        # Imports Ray, which reads how to authenticate on its first import: the session has said it by now.
        from embedloom.retrieval.corpora import embed_artefact

        done = embed_artefact(config, corpus, model, machine.stages.embedding, writer)
    ended("embed", done.manifest["seconds"], done.counts)
    return place.uri
