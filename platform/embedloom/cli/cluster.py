"""``embedloom cluster``: the files that launchers, KubeRay and Serve read, and where a profile's stages go."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedloom.cli.options import ClusterFile, ProfileName

if TYPE_CHECKING:
    from embedloom.config.cluster import ClusterConfig

LOCAL = "local"

app = typer.Typer(
    no_args_is_help=True, help="Write or check the files that launchers, KubeRay and Serve read."
)


@app.command("render")
def cluster_render(
    profile: ProfileName = LOCAL,
    cluster: ClusterFile = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.")] = Path("cluster/rendered"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and write nothing.")] = False,
) -> None:
    """Write launcher, KubeRay and Serve files of a profile."""
    from embedloom.cluster.render import render
    from embedloom.config.cluster import load_cluster
    from embedloom.config.shipped import cluster_file

    config = load_cluster(cluster_file(cluster))
    config.profile(profile)
    if not dry_run:
        for path in render(config, profile, out):
            print(path)
    print(out)


@app.command("check")
def cluster_check(
    profile: ProfileName = LOCAL,
    cluster: ClusterFile = None,
    crds: Annotated[
        Path | None,
        typer.Option(
            "--crds", metavar="FOLDER", help="KubeRay's definitions: ray-operator/config/crd/bases."
        ),
    ] = None,
    pods: Annotated[
        bool, typer.Option("--pods", help="Also say what would keep the profile's pods from starting.")
    ] = False,
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="CONFIG", help="With --pods: a run whose models the pods must get."),
    ] = None,
) -> None:
    """Validate what render would write with what reads it."""
    from embedloom.cluster.render import check
    from embedloom.config.cluster import load_cluster
    from embedloom.config.shipped import cluster_file
    from embedloom.errors import ConfigError

    if run is not None and not pods:
        raise ConfigError("--run: is read with --pods only")
    path = cluster_file(cluster)
    config = load_cluster(path)
    for line in check(config, profile, crds=crds):
        print(line)
    if pods:
        _check_pods(config, profile, run)
    print(path)


def _check_pods(config: "ClusterConfig", profile: str, run: str | None) -> None:
    """Print what ``check_pods`` finds; raise ConfigError if pods would not start."""
    from embedloom.cluster.pods import check_pods
    from embedloom.config.run import load_run
    from embedloom.config.shipped import config_file
    from embedloom.errors import ConfigError

    report = check_pods(config, profile, None if run is None else load_run(config_file(run)))
    for line in report.lines:
        print(line)
    if report.problems:
        raise ConfigError(
            f"--pods: {len(report.problems)} problems of profile {profile}; the lines above say which"
        )


@app.command("placement")
def cluster_placement(
    profile: ProfileName = LOCAL,
    cluster: ClusterFile = None,
    simulate: Annotated[
        bool,
        typer.Option("--simulate", help="Also place it on a Ray of as many nodes with made-up GPUs, here."),
    ] = False,
) -> None:
    """What each stage asks for, on how many nodes it lands, and what stays pending."""
    from embedloom.config.cluster import load_cluster, placement_table
    from embedloom.config.shipped import cluster_file

    path = cluster_file(cluster)
    config = load_cluster(path)
    machines = config.profile(profile)
    print(placement_table(machines)[0])
    if simulate:
        from embedloom.cluster.session import ensure_token, set_ray_environment

        set_ray_environment(config.auth)
        ensure_token(config.auth)
        # Imports Ray, which reads how to authenticate on its first import.
        from embedloom.cluster.simulation import simulate as run_simulation

        print(run_simulation(machines))
    print(path)
