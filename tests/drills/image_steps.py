"""The image's own steps without Docker: read from docker/Dockerfile, done in a bare root file system.

    sudo python tests/drills/image_steps.py --target cpu --root /var/tmp/image --build-arg PIP_EXTRA_INDEX_URL=...

``FROM debian:SUITE-slim`` becomes debootstrap's minimal base, which is what that image is made of. RUN is done by ``/bin/sh
-c`` in a chroot with a mount namespace of its own, where nothing of this machine is seen but its network; COPY takes only
what docker/Dockerfile.dockerignore lets through. Whatever the steps do not install is missing, as it would be in the image.
Needs root, debootstrap and a gigabyte (cpu) or 13 (cuda). The last step of a target is ``embedloom doctor``.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[2]
DOCKERFILE = PROJECT / "docker/Dockerfile"
_DEBIAN = re.compile(r"debian:(?P<suite>[a-z]+)(-slim)?")
_CACHE = re.compile(r"--mount=type=cache,target=(?P<folder>\S+)\s+")


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction: its line, its word and what follows."""

    line: int
    word: str
    rest: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.word} {self.rest}"


def read_steps(text: str) -> Iterator[Step]:
    """Instructions of a Dockerfile, continued lines joined, comments left out."""
    joined, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not (joined or line.strip()):
            continue
        first = first or number
        joined += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        word, _, rest = joined.strip().partition(" ")
        yield Step(first, word.upper(), " ".join(rest.split()) if word.upper() != "RUN" else rest.strip())
        joined, first = "", 0


def stages(steps: Sequence[Step]) -> dict[str, tuple[str, list[Step]]]:
    """Stage -> what it is made from, and its own steps."""
    found: dict[str, tuple[str, list[Step]]] = {}
    for step in steps:
        if step.word == "FROM":
            source, _, name = step.rest.partition(" AS ")
            found[name or source] = (source, own := [])
        else:
            own.append(step)
    return found


def chain(found: Mapping[str, tuple[str, list[Step]]], target: str) -> tuple[str, list[Step]]:
    """The outer image that a target comes from, and all its steps.

    Raises:
        SystemExit: no such target.
    """
    if target not in found:
        raise SystemExit(f"--target {target!r}: allowed: {', '.join(found)}")
    source, steps = found[target]
    while source in found:
        source, before = found[source]
        steps = [*before, *steps]
    return source, steps


def let_through(path: str, patterns: Sequence[str]) -> bool:
    """Whether a file is part of the build, by the rules of a .dockerignore file: the last pattern that fits decides."""
    kept = True
    for pattern in patterns:
        rule = pattern.removeprefix("!")
        if re.match(_expression(rule) + "(/|$)", path):
            kept = pattern.startswith("!")
    return kept


def _expression(rule: str) -> str:
    parts = {"**/": "(?:.*/)?", "*": "[^/]*"}
    return "".join(parts.get(one) or re.escape(one) for one in re.split(r"(\*\*/|\*)", rule))


class Image:
    """A root file system that steps are done in."""

    def __init__(self, root: Path, arguments: argparse.Namespace) -> None:
        self.root = root
        self.given = dict(one.split("=", 1) for one in arguments.build_arg)
        self.outside = dict(one.split("=", 1) for one in arguments.env)
        self.binds = [tuple(one.split(":", 1)) for one in arguments.bind]
        self.cache: Path | None = arguments.cache
        self.environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
        }
        self.arguments: dict[str, str] = {}
        self.folder = "/"

    def do(self, step: Step) -> None:
        """Do one step.

        Raises:
            SystemExit: it failed, or it is of a kind that this script does not know.
        """
        actions = {
            "ENV": self._set,
            "ARG": self._argument,
            "WORKDIR": self._enter,
            "COPY": self._copy,
            "RUN": self._run,
        }
        if step.word == "CMD":
            return
        if step.word not in actions:
            raise SystemExit(f"{step}: allowed here: {', '.join(actions)} and CMD")
        actions[step.word](step)

    def _set(self, step: Step) -> None:
        name, _, value = step.rest.partition("=")
        self.environment[name] = value

    def _argument(self, step: Step) -> None:
        name, _, default = step.rest.partition("=")
        if value := self.given.get(name, default):
            self.arguments[name] = value

    def _enter(self, step: Step) -> None:
        self.folder = step.rest
        (self.root / step.rest.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _copy(self, step: Step) -> None:
        *sources, target = shlex.split(step.rest)
        patterns = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
        patterns = [one for one in patterns if one and not one.startswith("#")]
        for source in sources:
            base = PROJECT / source
            files = (
                [base]
                if base.is_file()
                else [one for one in base.rglob("*") if one.is_file() or one.is_symlink()]
            )
            kept = [one for one in files if let_through(one.relative_to(PROJECT).as_posix(), patterns)]
            if not kept:
                raise SystemExit(f"{step}: the build has no {source}")
            into = self.root / target.lstrip("/")
            for file in kept:
                place = into / file.name if base.is_file() and target.endswith("/") else into
                place = place if base.is_file() else into / file.relative_to(base)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, place, follow_symlinks=False)

    def _run(self, step: Step) -> None:
        binds = [*self.binds]
        if (cached := _CACHE.match(step.rest)) and self.cache is not None:
            binds.append((str(self.cache), cached["folder"]))
        lines = ["set -e"]
        for outside, inside in [
            ("/proc", "/proc"),
            ("/dev", "/dev"),
            ("/etc/resolv.conf", "/etc/resolv.conf"),
            *binds,
        ]:
            place = shlex.quote(str(self.root / inside.lstrip("/")))
            make = "mkdir -p" if Path(outside).is_dir() else "touch"
            lines += [f"{make} {place}", f"mount --rbind {shlex.quote(outside)} {place}"]
        command = _CACHE.sub("", step.rest)
        lines.append(
            f"exec chroot {shlex.quote(str(self.root))} /bin/sh -c {shlex.quote(f'cd {self.folder} && {command}')}"
        )
        seen = self.environment | self.arguments | self.outside
        done = subprocess.run(
            ["unshare", "--mount", "/bin/sh", "-c", "\n".join(lines)], env=seen, check=False
        )
        if done.returncode:
            raise SystemExit(f"{step}: ended with {done.returncode}")


def main() -> None:
    """Do a target's steps, each with its time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="cpu", help="stage of the Dockerfile")
    parser.add_argument(
        "--root", type=Path, required=True, help="folder for the root file system; made if it is not there"
    )
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build's"
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="what this network needs, of RUN"
    )
    parser.add_argument(
        "--bind",
        action="append",
        default=[],
        metavar="HERE:THERE",
        help="what it needs, such as certificates",
    )
    parser.add_argument("--cache", type=Path, help="folder of cache mounts; without one, nothing is kept")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("image_steps: needs root, for chroot and mounts")
    source, steps = chain(stages(list(read_steps(DOCKERFILE.read_text()))), arguments.target)
    debian = _DEBIAN.fullmatch(source)
    if debian is None:
        raise SystemExit(f"FROM {source}: allowed here: a Debian image")
    if not (arguments.root / "etc/debian_version").is_file():
        print(f"[FROM {source}] debootstrap --variant=minbase", flush=True)
        subprocess.run(["debootstrap", "--variant=minbase", debian["suite"], str(arguments.root)], check=True)
    image = Image(arguments.root.absolute(), arguments)
    for step in steps:
        print(f"[{step}]", flush=True)
        start = time.monotonic()
        image.do(step)
        print(f"[line {step.line}: done in {time.monotonic() - start:.0f} s]", flush=True)
    print(f"target {arguments.target}: {len(steps)} steps done in {arguments.root}", file=sys.stderr)


if __name__ == "__main__":
    main()
