"""How the image's steps are read (``image_steps.py``), and what docker/Dockerfile must agree with."""

import re

import pytest
import yaml

from drills.image_steps import DOCKERFILE, PROJECT, Step, chain, let_through, read_steps, stages

SAMPLE = """\
# syntax=docker/dockerfile:1

FROM debian:bookworm-slim AS base
# said about the next
RUN apt-get update \\
    && apt-get install --yes \\
        make
FROM base AS small
ENV A=b
RUN --mount=type=cache,target=/c echo  'two  spaces'
"""


def steps_of(target: str) -> tuple[str, list[Step]]:
    return chain(stages(list(read_steps(DOCKERFILE.read_text()))), target)


def test_lines_are_joined_and_comments_left_out():
    steps = list(read_steps(SAMPLE))
    assert [(step.line, step.word) for step in steps] == [
        (3, "FROM"),
        (5, "RUN"),
        (8, "FROM"),
        (9, "ENV"),
        (10, "RUN"),
    ]
    assert steps[1].rest.split() == ["apt-get", "update", "&&", "apt-get", "install", "--yes", "make"]
    assert steps[4].rest.endswith("echo  'two  spaces'")  # a shell's words stay as they are


def test_a_target_has_the_steps_of_what_it_comes_from():
    source, steps = chain(stages(list(read_steps(SAMPLE))), "small")
    assert source == "debian:bookworm-slim"
    assert [step.line for step in steps] == [5, 9, 10]
    with pytest.raises(SystemExit, match="'big': allowed: base, small"):
        chain(stages(list(read_steps(SAMPLE))), "big")


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("pyproject.toml", True),
        ("platform/embedloom/cli/root.py", True),
        ("jobs/configs/quickstart.yaml", True),
        ("jobs/run_pipeline.py", False),
        ("runs/quickstart/model.safetensors", False),
        ("platform/embedloom/__pycache__/a.pyc", False),
        ("platform/embedloom/encoder/_int8.abi3.so", False),
        (".git/config", False),
    ],
)
def test_the_build_sees_what_the_package_is_made_of(path, kept):
    patterns = (PROJECT / "docker/Dockerfile.dockerignore").read_text().splitlines()
    patterns = [one for one in patterns if one and not one.startswith("#")]
    assert let_through(path, patterns) is kept


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_ends_in_the_doctor_and_copies_what_is_there(target):
    source, steps = steps_of(target)
    assert source == "debian:bookworm-slim"
    assert [step.rest for step in steps if step.word == "RUN"][-1] == "embedloom doctor"
    copied = [word for step in steps if step.word == "COPY" for word in step.rest.split()[:-1]]
    assert f"cluster/requirements-{'cpu-3.11' if target == 'cpu' else 'cuda'}.lock" in copied
    assert {"pyproject.toml", "platform", "cluster", "jobs/configs"} <= set(copied)
    assert all((PROJECT / one).exists() for one in copied)


def test_the_image_has_the_python_of_locks_and_cluster():
    """Debian 12's is 3.11: of the CUDA lock, of the CPU lock that the image takes, and of `ray.python`."""
    assert "Python 3.11" in (PROJECT / "cluster/requirements-cuda.lock").read_text().splitlines()[0]
    assert yaml.safe_load((PROJECT / "cluster/cluster.yaml").read_text())["ray"]["python"] == "3.11"


def test_every_node_has_what_kuberay_and_the_launcher_call():
    _, steps = steps_of("cuda")
    (installed,) = [step.rest for step in steps if "python3-venv" in step.rest]
    assert {"wget", "rsync", "g++", "make"} <= set(re.split(r"\s+", installed))
    assert any("/etc/profile.d/embedloom.sh" in step.rest for step in steps)  # KubeRay's is a login shell
