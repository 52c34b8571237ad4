"""``embedloom submit``: a run, or one stage of it, as a Ray job, or as a RayJob for KubeRay."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from embedloom.artefacts import fingerprint
from embedloom.cluster.documents import check_pools
from embedloom.cluster.jobs import Submission, submit
from embedloom.cluster.kuberay import RAY_JOB_CONFIG, RayJobOrder, config_map, ray_job
from embedloom.config.base import apply_overrides, read_yaml
from embedloom.errors import ConfigError
from embedloom.pipeline import graph
from embedloom.run import Run


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """What the command line says beside the run: its files, and where and how the job runs."""

    config: Path
    cluster: Path
    overrides: tuple[str, ...] = ()
    stage: str | None = None
    address: str | None = None
    on_interrupt: Literal["stop", "detach"] = "stop"


def submit_run(run: Run, options: SubmitOptions, dry_run: bool) -> int:
    """Send the run, or one stage, to a Ray cluster as a job; returns the driver's exit code."""
    verb = _verb(run, options.stage)
    arguments = [verb, str(options.config), "--profile", run.profile_name, "--cluster", str(options.cluster)]
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
        start_head=options.address is None and run.profile.backend == "local",
        on_interrupt=options.on_interrupt,
        key=fingerprint(arguments),
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
    content = apply_overrides(read_yaml(options.config), list(options.overrides))
    files = {
        "run.yaml": yaml.safe_dump(content, sort_keys=False, allow_unicode=True),
        "cluster.yaml": options.cluster.read_text(),
    }
    arguments = (verb, f"{RAY_JOB_CONFIG}/run.yaml", "--profile", run.profile_name)
    order = RayJobOrder(_resource_name(run.config.run.name, verb), arguments, files)
    documents = [config_map(run.profile, order), ray_job(run.cluster, run.profile, order)]
    out.parent.mkdir(parents=True, exist_ok=True)
    header = f"# kubectl apply -f {out.name}; kubectl logs -f -l job-name={order.name} -n {run.profile.namespace}\n"
    out.write_text(header + yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True))


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
