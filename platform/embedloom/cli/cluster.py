"""``embedloom cluster``: the files that launchers, KubeRay and Serve read, and where a profile's stages go."""

from pathlib import Path
from typing import Annotated

import typer

from embedloom.cli.options import ClusterFile, ProfileName

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
) -> None:
    """Validate what render would write with what reads it."""
    from embedloom.cluster.render import check
    from embedloom.config.cluster import load_cluster
    from embedloom.config.shipped import cluster_file

    path = cluster_file(cluster)
    for line in check(load_cluster(path), profile, crds=crds):
        print(line)
    print(path)


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
