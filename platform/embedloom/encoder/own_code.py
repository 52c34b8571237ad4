"""Models whose code lies beside the weights (``auto_map``, module classes): run only where ``trust_remote_code`` says so.

A model that is trusted is opened out of a folder of this machine's cache, made for it: its code as it was when it was
allowed, its other files by link. So the permission goes wherever the folder's path goes, into actors and replicas, code
that changes later is not run, and nothing that lies in a model's own folder can give it.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedloom.core.contents import cache_folder, contents_of, digest
from embedloom.core.progress import note
from embedloom.errors import DataError

# Where a person may say it, as errors name it.
SWITCH = (
    "trust_remote_code: true of a teacher, mining.rescoring, embedding or serving, or --trust-remote-code of embed, serve, "
    "deploy and gate"
)
# Repositories with code of their own whose whole difference from a known architecture is in their config:
# nvidia/llama-embed-nemotron-8b and its 1B siblings are LlamaModel without the causal mask.
_READ_AS_LLAMA = {"llama_bidirec"}
_NAMING_CODE = ("config.json", "tokenizer_config.json", "processor_config.json")
_LIBRARY = "sentence_transformers."


def read_as_llama(config: dict[str, Any]) -> bool:
    """Whether a model's own code is not needed, as transformers' Llama computes the same."""
    return config.get("model_type") in _READ_AS_LLAMA


def trusted_copy(folder: Path) -> Path:
    """The folder out of which a model's own code is run; of a model without, the folder itself.

    Args:
        folder: of a model whose code a person allows.

    Raises:
        DataError: its code lies in another repository, or is not there.
    """
    references = sorted(set(_references(folder)))
    if not references:
        note(
            "model",
            f"{folder.name}: trust_remote_code changes nothing, it has no code of its own that is needed",
        )
        return folder
    elsewhere = [one for one in references if "--" in one]
    if elsewhere:
        raise DataError(
            f"{folder}: its code lies in another repository ({elsewhere[0]}), where it may change unseen; allowed: a folder "
            "with the code beside the weights, named so in its auto_map"
        )
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {
        name: path for name, path in files.items() if not any(part.startswith(".") for part in name.parts)
    }
    code = {name.as_posix(): path for name, path in files.items() if name.suffix == ".py"}
    if not code:
        raise DataError(f"{folder}: it names code of its own ({references[0]}), but has no .py file")
    held = contents_of(code)
    key = hashlib.sha256("\0".join([str(folder), *map(str, files), digest(held)]).encode()).hexdigest()[:16]
    copy = cache_folder() / "trusted" / key / folder.name
    if not copy.is_dir():
        _link(files, set(code), copy)
    note("model", f"{folder.name}: its own code is run: {', '.join(code)} ({digest(held)[:16]})")
    return copy


def _link(files: dict[Path, Path], code: set[str], copy: Path) -> None:
    """Make the folder whole or not at all: several processes may want it at once."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="_tmp-", dir=copy.parent))
    for name, path in files.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        if name.as_posix() in code:
            shutil.copyfile(path, temporary / name)
        else:
            (temporary / name).symlink_to(path.resolve())
    try:
        temporary.rename(copy)
    except OSError:
        shutil.rmtree(temporary)
        if not copy.is_dir():
            raise


def _references(folder: Path) -> Iterator[str]:
    """What the model's files name as code of its own: ``modeling_own.OwnModel``, ``org/repo--modeling_own.OwnModel``."""
    for path in (found for name in _NAMING_CODE for found in sorted(folder.rglob(name))):
        content = json.loads(path.read_text())
        if read_as_llama(content):
            continue
        for value in (content.get("auto_map") or {}).values():
            yield from (one for one in (value if isinstance(value, list) else [value]) if one)
    modules = folder / "modules.json"
    for module in json.loads(modules.read_text()) if modules.is_file() else ():
        kind = str(module.get("type", ""))
        if not kind.startswith(_LIBRARY):
            yield kind
