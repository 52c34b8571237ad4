"""The built wheel: its tag, its content, what its machine code asks of a CPU, and `embedloom plan` from an empty folder.

It is built offline, as ``pip wheel --no-build-isolation`` does.
"""

import os
import re
import shutil
import subprocess
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from wheel_build import ROOT, build

PACKAGE = ROOT / "platform/embedloom"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist unpacked, and the wheel that is built from it."""
    return build(tmp_path_factory.mktemp("wheel"))


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_one_wheel_for_every_python(built):
    _, wheel = built
    assert re.fullmatch(r"embedloom-[\d.]+-cp311-abi3-linux_\w+\.whl", wheel.name)
    extensions = {name for name in names(wheel) if name.endswith(".so")}
    sources = {str(path.relative_to(ROOT / "platform").with_suffix("")) for path in PACKAGE.rglob("*.c")}
    assert {name.removesuffix(".abi3.so") for name in extensions} == sources
    assert len(sources) == 3


def test_the_wheel_has_what_running_needs_and_no_more(built):
    _, wheel = built
    tracked = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted = {
        str(path.relative_to(ROOT / "platform")) for path in tracked if path.suffix not in {".c", ".h", ".so"}
    }
    code = {name for name in names(wheel) if not name.endswith(".so") and ".dist-info/" not in name}
    assert code == wanted
    with zipfile.ZipFile(wheel) as archive:
        for path in (PACKAGE / "shipped").rglob("*.yaml"):
            assert archive.read(str(path.relative_to(ROOT / "platform"))) == path.read_bytes()


def test_the_sdist_has_what_compiling_needs(built):
    unpacked, _ = built
    for path in [*PACKAGE.rglob("*.c"), *PACKAGE.rglob("*.h")]:
        assert (unpacked / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert not any(path.is_symlink() for path in unpacked.rglob("*"))


@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils")
@pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="x86 machine code")
def test_vector_code_is_only_in_functions_that_a_check_of_the_cpu_guards(built, tmp_path):
    """A ``-march=native`` anywhere puts VEX instructions everywhere, and older CPUs die of them."""
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".so")):
            library = Path(archive.extract(name, tmp_path))
            source = (ROOT / "platform" / name).parent
            text = "".join(path.read_text() for path in [*source.glob("*.c"), *source.glob("*.h")])
            guarded = set(re.findall(r"^TARGET static [\w *]+?(?:NAME\()?(\w+)\)?\(", text, re.MULTILINE))
            listing = subprocess.run(
                ["objdump", "-d", "--no-show-raw-insn", str(library)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            found = set()
            for function, body in re.findall(
                r"^\w+ <([\w.]+)>:\n(.*?)(?:\n\n|\Z)", listing, re.MULTILINE | re.DOTALL
            ):
                if re.search(r":\s+v\w+\s", body):
                    found.add(re.sub(r"(_8|_16)?(\.\w+)*$", "", function))
            assert found and found <= guarded, (name, found - guarded)


def test_an_installed_wheel_plans_the_quickstart_from_an_empty_folder(built, tmp_path):
    _, wheel = built
    folder, empty = tmp_path / "venv", tmp_path / "empty"
    venv.create(folder, symlinks=True)
    empty.mkdir()
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # The dependencies are this environment's; its own embedloom is an import hook in a .pth that is not read here.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    script = "import sys, embedloom\nfrom embedloom.cli import main\nprint(embedloom.__file__, file=sys.stderr)\nmain()"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def embedloom(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [str(folder / "bin/python"), "-c", script, *words]
        return subprocess.run(
            command, cwd=empty, capture_output=True, text=True, check=False, env=environment
        )

    planned = embedloom("plan", "quickstart")
    assert planned.returncode == 0, planned.stderr
    assert planned.stderr.startswith(str(site))
    assert planned.stdout.splitlines()[-1] == "runs/quickstart"
    assert "gate" in planned.stdout
    assert embedloom("doctor").stdout.count("compiled") == 3
    unknown = embedloom("plan", "quikstart")
    assert unknown.returncode == 2 and "'quickstart'" in unknown.stderr
    assert list(empty.iterdir()) == []
