"""``embedloom submit``: a run, or one stage of it, as a Ray job, or as a RayJob for KubeRay."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from embedloom.cluster.jobs import Submission, submit
from embedloom.cluster.manifests import RAY_JOB_CONFIG, RayJobOrder, check_pools, config_map, ray_job
from embedloom.config.base import apply_overrides, read_yaml
from embedloom.config.run import Run
from embedloom.config.shipped import cluster_file, config_file, shipped_configs
from embedloom.core.artefacts import fingerprint
from embedloom.errors import ConfigError
from embedloom.pipeline.graph import graph


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """What the command line says beside the run: its files, and where and how the job runs."""

    config: Path  # a file, or the name of a shipped run config
    cluster: Path | None  # the option --cluster
    overrides: tuple[str, ...] = ()
    stage: str | None = None
    address: str | None = None
    on_interrupt: Literal["stop", "detach"] = "stop"
    verbose: bool = False


def submit_run(run: Run, options: SubmitOptions, dry_run: bool) -> int:
    """Send the run, or one stage, to a Ray cluster as a job; returns the driver's exit code."""
    verb = _verb(run, options.stage)
    local = options.address is None and run.profile.backend == "local"
    arguments = [verb, _in_job(options.config, local), "--profile", run.profile_name]
    # Without the option the job looks for its cluster config as this command did, in a copy of the same folder.
    if options.cluster is not None:
        arguments += ["--cluster", _in_job(options.cluster, local)]
    for item in options.overrides:
        arguments += ["--set", item]
    if run.place.is_local and run.profile.storage.root is None:
        # The job's working directory is an unpacked copy; artefacts belong into the user's own folder.
        arguments += ["--set", f"run.output_dir={Path(run.config.run.output_dir).absolute()}"]
    if dry_run:
        return 0
    order = Submission(
        tuple(arguments),
        profile_name=run.profile_name,
        working_dir=Path.cwd(),
        address=options.address,
        start_head=local,
        on_interrupt=options.on_interrupt,
        key=fingerprint(arguments),
        verbose=options.verbose,
    )
    return submit(order, run.cluster)


def render_job(run: Run, options: SubmitOptions, out: Path) -> None:
    """Write the RayJob of this run, with a ConfigMap of the configs it reads, for ``kubectl apply``.

    Raises:
        ConfigError: a profile without node pools, or artefacts that only this machine would see.
    """
    verb = _verb(run, options.stage)
    if not run.profile.pools:
        raise ConfigError(
            f"--render-job: profile {run.profile_name!r} has no pools, so it is no cluster for KubeRay"
        )
    check_pools(run.profile, run.profile_name)
    if run.profile.storage.root is None and run.place.is_local and not run.place.uri.startswith("/"):
        raise ConfigError(
            f"--render-job: {run.place.uri!r} would be lost with the job's pods; set profiles.{run.profile_name}."
            "storage.root, or run.output_dir to a place that stays"
        )
    path = config_file(options.config)
    content = apply_overrides(read_yaml(path), list(options.overrides))
    files = {
        "run.yaml": yaml.safe_dump(content, sort_keys=False, allow_unicode=True),
        "cluster.yaml": cluster_file(options.cluster, path).read_text(),
    }
    arguments = (verb, f"{RAY_JOB_CONFIG}/run.yaml", "--profile", run.profile_name)
    order = RayJobOrder(_resource_name(run.config.run.name, verb), arguments, files)
    documents = [config_map(run.profile, order), ray_job(run.cluster, run.profile, order)]
    out.parent.mkdir(parents=True, exist_ok=True)
    header = f"# kubectl apply -f {out.name}; kubectl logs -f -l job-name={order.name} -n {run.profile.namespace}\n"
    out.write_text(header + yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True))


def _in_job(path: Path, local: bool) -> str:
    """A file as the job's command names it: the job starts in a copy of the working folder.

    Raises:
        ConfigError: a file outside that folder, which another machine does not have.
    """
    if not path.is_file() and str(path) in shipped_configs():
        return str(path)
    folder, absolute = Path.cwd(), path.parent.resolve() / path.name
    if absolute.is_relative_to(folder):
        return str(path if local else absolute.relative_to(folder))
    if not local:
        raise ConfigError(
            f"{path}: not below the working folder {folder}, of which the cluster gets a copy; copy the file there, or "
            "use --render-job, which takes it along"
        )
    return str(absolute)


def _verb(run: Run, stage: str | None) -> str:
    verb = stage or "run"
    allowed = {"run"} | {node.verb for node in graph(run).values()} - {"corpus", "encoder"}
    if verb not in allowed:
        raise ConfigError(
            f"--stage: {verb!r} is not a stage of this run; allowed: {', '.join(sorted(allowed))}"
        )
    return verb


def _resource_name(run_name: str, verb: str) -> str:
    """A name Kubernetes takes: lower case, digits and dashes; KubeRay adds to it, so it stays short."""
    name = re.sub(r"[^a-z0-9]+", "-", f"embedloom-{run_name}-{verb}".lower()).strip("-")
    return name if len(name) <= 40 else f"{name[:31].rstrip('-')}-{fingerprint(name)[:8]}"
