"""A model folder, opened once: its prompt contract, what identifies its weights, where it comes from, what was judged.

Everything is read when it is asked for, and once. Nothing here loads weights or imports torch: a folder that others made
needs transformers to be understood, so what reads it is handed in (``encoder.registry.open_model`` does).
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from embedloom.core.artefacts import MANIFEST_FILE, Artefact
from embedloom.core.contents import Contents, contents_of, digest, is_trusted
from embedloom.core.prompting import CONTRACT_FILE, PromptContract
from embedloom.core.storage import Place
from embedloom.core.verdict import (
    GATE_FILE,
    INT8_FILE,
    PASSED,
    Int8Verdict,
    Verdict,
    read_int8_verdict,
    read_verdict,
)
from embedloom.errors import DataError

_DIGITS = 16
_BLOCK_BYTES = 16 * 2**20
_MODEL_ENDINGS = (".json", ".safetensors", ".txt", ".model", ".jinja")
_OLD_WEIGHTS = (".bin",)  # read only where there are no safetensors
# Written beside weights by whoever judged, trained or merged them: they change nothing that is computed.
_NOT_READ = {MANIFEST_FILE, "_building.json", GATE_FILE, INT8_FILE, "lineage.json", "search.json"}
_OTHER_ENGINES = ("onnx", "openvino")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "config.json",
)  # fmt: skip
_MODULE_WEIGHTS = {"model.safetensors", "pytorch_model.bin"}  # of layers after the pooling
_SHARED_FOLDERS = re.compile(r"site-packages|dist-packages|models--.+")  # of Python, of the Hugging Face hub
_UNGATED = "serve it all the same with serving.require_gate: false"


class ForeignLayout(Protocol):
    """What the files of a model without ``contract.json`` say; ``encoder.foreign.Layout``."""

    @property
    def transformer(self) -> Path:
        """Folder of config, weights and tokenizer."""

    @property
    def head(self) -> tuple[Any, ...]:
        """Layers after the pooling: ``encoder.head.HeadModule``."""

    @property
    def beyond(self) -> str | None:
        """Why our encoder would compute something else; None: it would not."""

    def contract(self) -> PromptContract:
        """The contract that the files describe."""

    def prompts_only(self) -> PromptContract:
        """The same of a model that sentence-transformers runs: only its templates say something."""


def _our_own_only(folder: Path) -> ForeignLayout:
    raise DataError(
        f"{folder / CONTRACT_FILE}: missing; every embedloom model folder carries its prompt contract"
    )


class ModelFolder:
    """One model folder in Hugging Face layout, ours (with ``contract.json``) or foreign."""

    def __init__(
        self,
        path: Path,
        read_foreign: Callable[[Path], ForeignLayout] = _our_own_only,
        travels: Any = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            path: the folder.
            read_foreign: what understands a folder without a contract; without it, such a folder has only contents.
            travels: what other machines open the model by (``encoder.registry.NodeModel``); None: the path.
        """
        self.path = path.expanduser().absolute()
        self.travels: Any = self.path if travels is None else travels
        self._read_foreign = read_foreign

    @cached_property
    def layout(self) -> ForeignLayout | None:
        """What a foreign model's files say; None where the folder has a contract of its own.

        Raises:
            DataError: a config that cannot be read.
        """
        return None if (self.path / CONTRACT_FILE).exists() else self._read_foreign(self.path)

    @property
    def transformer(self) -> Path:
        """Folder of config and tokenizer; a foreign model may keep them in ``0_Transformer``."""
        return self.path if self.layout is None else self.layout.transformer

    @property
    def head(self) -> tuple[Any, ...]:
        """Layers after the pooling; embedloom's own models have none."""
        return () if self.layout is None else self.layout.head

    @property
    def beyond(self) -> str | None:
        """Why our encoder would compute something else than sentence-transformers does; None if it would not."""
        return None if self.layout is None else self.layout.beyond

    def check_computable(self) -> None:
        """Return where our encoder can compute the model.

        Raises:
            DataError: it cannot; the message says why.
        """
        if self.beyond is not None:
            raise DataError(
                f"{self.path}: our encoder would compute other vectors than its authors': {self.beyond}"
            )

    @cached_property
    def contract(self) -> PromptContract:
        """Its prompt contract; of a foreign model, the one its files describe.

        Raises:
            DataError: a broken one, or a foreign model that our encoder cannot compute.
        """
        if self.layout is None:
            return PromptContract.load(self.path)
        self.check_computable()
        return self.layout.contract()

    @cached_property
    def scored_contract(self) -> PromptContract:
        """The contract by which it is evaluated, where sentence-transformers may run it.

        Raises:
            DataError: a broken one.
        """
        return self.contract if self.layout is None or self.beyond is None else self.layout.prompts_only()

    # Identity: artefacts record each of these hashes, so none may change.

    @cached_property
    def contents(self) -> Contents:
        """Hashes of the files that models are read from, weights and tokenizer among them, by path.

        Raises:
            DataError: a file that cannot be read.
        """
        return self.contents_with(self.is_trusted)

    def contents_with(self, code: bool) -> Contents:
        """The same; ``code``: whether the code beside the weights is to be run, and so counts."""
        return contents_of(_model_files(self.path, code))

    @cached_property
    def tokenizer_contents(self) -> Contents:
        """The same of the files that decide how texts are cut into tokens."""
        return contents_of({name: path for name in _TOKENIZER_FILES if (path := self.path / name).is_file()})

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over ``contents``, wherever the folder lies; part of the hash of teachers' vectors.

        Every byte counts: models tuned in a few layers share their first and last megabytes.
        """
        return digest(self.contents)[:_DIGITS]

    @property
    def id(self) -> str:
        """What vectors name as their model: the artefact's fingerprint; of any other folder ``name@fingerprint``."""
        return f"{self.path.name}@{self.fingerprint}" if self.artefact is None else self.artefact.fingerprint

    @cached_property
    def weights(self) -> str:
        """What verdicts are about: sixteen hex digits over all weights, the contract and the model's config.

        Read whole, about 1 s per 1-2 GB. Of a foreign model ``fingerprint``, which covers modules, layers after the
        pooling, prompts and tokenizer too.

        Raises:
            DataError: no weights.
        """
        if not (self.path / CONTRACT_FILE).is_file():
            if not any(name.endswith((".safetensors", ".bin")) for name in self.contents):
                raise DataError(
                    f"{self.path}: no *.safetensors or *.bin, so this is not a model folder with weights"
                )
            return self.fingerprint
        weights = self._checked_weights(sorted(self.path.glob("*.safetensors")))
        return self._hash([self.path / "config.json", self.path / CONTRACT_FILE, *weights])

    @cached_property
    def revision(self) -> str:
        """What results are kept under: the artefact's fingerprint, else a hash over weights and configuration.

        Raises:
            DataError: no weights, or a corrupt manifest.
        """
        if self.artefact is not None:
            return self.artefact.fingerprint
        modules = [path for path in sorted(self.path.glob("*/*")) if path.name in _MODULE_WEIGHTS]
        weights = self._checked_weights([*sorted(self.path.glob("*.safetensors")), *modules])
        judged = (GATE_FILE, INT8_FILE)
        configs = [path for path in sorted(self.path.glob("*.json")) if path.name not in judged]
        code = sorted(self.path.rglob("*.py")) if self.is_trusted else []
        return self._hash([*configs, *weights, *code])

    def _checked_weights(self, found: list[Path]) -> list[Path]:
        if not found:
            raise DataError(f"{self.path}: no *.safetensors, so this is not a model folder with weights")
        return found

    def _hash(self, paths: Iterable[Path]) -> str:
        found = hashlib.blake2b(digest_size=_DIGITS // 2)
        for path in paths:
            found.update(path.relative_to(self.path).as_posix().encode())
            if not path.is_file():
                continue
            with path.open("rb") as stream:
                while block := stream.read(_BLOCK_BYTES):
                    found.update(block)
        return found.hexdigest()

    @property
    def is_trusted(self) -> bool:
        """Whether the code beside the weights may be run: the folder is a copy made for it (``encoder.own_code``)."""
        return is_trusted(self.path)

    @property
    def is_artefact(self) -> bool:
        """Whether a run or a merge of embedloom made it."""
        return (self.path / MANIFEST_FILE).is_file()

    @cached_property
    def artefact(self) -> Artefact | None:
        """Its manifest; None for a folder that no run or merge made.

        Raises:
            DataError: a manifest that is corrupt, or none of a model.
        """
        return Artefact.open(Place(str(self.path)), "model") if self.is_artefact else None

    @property
    def weight_files(self) -> list[Path]:
        """All files of weights, in name order: a foreign transformer may have a folder of its own."""
        return sorted([*self.path.rglob("*.safetensors"), *self.path.rglob("pytorch_model*.bin")])

    def check_servable(self) -> None:
        """Return if this is a model folder that our encoder computes.

        Raises:
            DataError: it is none, has no weights, a broken prompt contract, or is beyond our encoder.
        """
        if not any((self.path / name).is_file() for name in ("config.json", "modules.json")):
            raise DataError(f"{self.path}: no config.json, so this is not a model folder")
        if not self.weight_files:
            raise DataError(f"{self.path}: no weights (*.safetensors) in this model folder")
        if self.layout is None:
            _ = self.contract
        else:
            self.check_computable()

    @property
    def keeps_verdict(self) -> bool:
        """Whether its verdict lies in the folder: embedloom made it, and it is in nobody else's care."""
        shared = any(_SHARED_FOLDERS.fullmatch(part) for part in self.path.resolve().parts)
        return not shared and any((self.path / name).is_file() for name in (MANIFEST_FILE, CONTRACT_FILE))

    def verdict(self, stated: str | None = None) -> Verdict | None:
        """What the promotion gate said of the model; None where it did not run.

        Args:
            stated: the file, where it is not in the folder.

        Raises:
            DataError: the file is not a verdict, or the stated one is missing.
        """
        path = self.path / GATE_FILE if stated is None else Path(stated).expanduser()
        if path.is_file():
            return read_verdict(path)
        if stated is not None:
            raise DataError(
                f"serving.verdict: {stated!r} does not exist; `embedloom gate` prints where it put it"
            )
        return None

    def check_gated(self, stated: str | None = None) -> None:
        """Return if these very weights passed the gate.

        Args:
            stated: the verdict's file, where it is not in the folder.

        Raises:
            DataError: no verdict, one about other weights, or a refusal; the message says how to go on.
        """
        verdict = self.verdict(stated)
        if verdict is None:
            name_it = "" if self.keeps_verdict else " and name the verdict that it writes as serving.verdict"
            raise DataError(
                f"{self.path}: has not passed the gate (no {GATE_FILE}); run `embedloom gate {self.path} --against "
                f"CURRENT`{name_it}, or {_UNGATED}"
            )
        if verdict["verdict"] != PASSED:
            reasons = "; ".join(str(reason) for reason in verdict.get("reasons", ()))
            raise DataError(f"{self.path}: the gate refused this model ({reasons}); {_UNGATED}")
        if verdict["weights"] != self.weights:
            raise DataError(
                f"{self.path}: {stated or GATE_FILE} is about weights {verdict['weights']}, these are {self.weights}; run "
                f"the gate again, or {_UNGATED}"
            )

    @property
    def int8_verdict(self) -> Int8Verdict | None:
        """What was measured of these very weights with 8-bit linear layers, or None.

        Raises:
            DataError: the file is not such a verdict.
        """
        path = self.path / INT8_FILE
        verdict = read_int8_verdict(path) if path.is_file() else None
        return verdict if verdict is not None and verdict["weights"] == self.weights else None

    def check_int8(self) -> None:
        """Return if these very weights may be served with 8-bit linear layers.

        Raises:
            DataError: they lose too much, or nobody has measured it; the message says what and how to go on.
        """
        verdict = self.int8_verdict
        override = f"{_UNGATED}, or with serving.compute_dtype: float32"
        if verdict is None:
            raise DataError(
                f"{self.path}: serving.compute_dtype is 'int8', and no {INT8_FILE} says what these weights lose by it; "
                f"`embedloom serve CONFIG` of their run measures it, or {override}"
            )
        if verdict["verdict"] != PASSED:
            scores = verdict["ndcg_at_10"]
            raise DataError(
                f"{self.path}: serving.compute_dtype 'int8' loses {verdict['lost']:.4f} nDCG@10 on {verdict['queries']} "
                f"held-out queries ({scores['float32']:.4f} with float32, {scores['int8']:.4f} with int8), allowed is "
                f"{verdict['allowed']}; {override}"
            )


def _model_files(folder: Path, code: bool) -> dict[str, Path]:
    """The files that models are read from, by path below the folder."""
    endings = (*_MODEL_ENDINGS, ".py") if code else _MODEL_ENDINGS
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    read = {
        name: path
        for name, path in paths.items()
        if not any(part.startswith((".", "_")) for part in name.parts)
        and name.parts[0] not in _OTHER_ENGINES
        and name.name not in _NOT_READ
    }
    safe = {name.parent for name in read if name.suffix == ".safetensors"}
    return {
        name.as_posix(): path
        for name, path in read.items()
        if name.suffix in endings or (name.suffix in _OLD_WEIGHTS and name.parent not in safe)
    }
