"""Scoring (query, document) pairs with a model that reads both texts at once."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from embedloom.core.artefacts import fingerprint
from embedloom.core.model_folder import ModelFolder
from embedloom.core.prompting import Templates
from embedloom.encoder.backbone import DTypeName, pick_device, pick_dtype
from embedloom.encoder.registry import NodeModel, local_folder
from embedloom.errors import DataError
from embedloom.retrieval.teachers import load_offline

PairScores = np.ndarray[Any, np.dtype[np.float32]]


class PairScorer(Protocol):
    """A loaded model; lives inside one actor."""

    @property
    def contract_hash(self) -> str:
        """What the texts went through; scores of different hashes are never compared."""
        ...

    def score(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        task_types: Sequence[str],
        instructions: Sequence[str | None],
    ) -> PairScores:
        """Relevance of each pair, float32 [len(queries)] from 0 to 1."""
        ...


class PairScorerSource(Protocol):
    """Where a scorer comes from: small and picklable, opened once in every actor."""

    @property
    def name(self) -> str:
        """Stamped on the scores."""
        ...

    def open(self) -> PairScorer:
        """Load the model."""
        ...


@dataclass(frozen=True, slots=True)
class CrossEncoderSource:
    """A cross-encoder with one label, run by sentence-transformers; code that lies beside the weights is never run.

    Also a reranking LLM saved for sentence-transformers (Transformer and LogitScore: log-odds of two answer tokens).
    A default prompt that its own files name applies as well.
    """

    name: str
    folder: Path | NodeModel
    templates: Templates  # of the query; a document is read as it is
    max_tokens: int = 512  # of a pair, special tokens included; the longer of the two texts is cut first
    batch_size: int = 32
    dtype: DTypeName = "auto"

    def open(self) -> "CrossEncoderScorer":
        """Load the model.

        Raises:
            DataError: the folder is no cross-encoder, or one with several labels.
        """
        return CrossEncoderScorer(self)


class CrossEncoderScorer:
    """sentence-transformers' ``CrossEncoder`` behind the ``PairScorer`` protocol."""

    def __init__(self, source: CrossEncoderSource) -> None:
        folder = local_folder(source.folder)
        check_cross_encoder(folder)
        self._source = source
        device = pick_device()
        self._dtype = pick_dtype(source.dtype, device)
        self._model = load_offline("CrossEncoder", folder, device, self._dtype, max_length=source.max_tokens)
        if self._model.num_labels != 1:
            raise DataError(
                f"{folder}: this cross-encoder has {self._model.num_labels} labels; allowed: 1, the relevance"
            )
        identity = ModelFolder(folder).fingerprint
        self._contract_hash = fingerprint(
            "cross_encoder", identity, source.templates.facts(), source.max_tokens
        )

    @property
    def contract_hash(self) -> str:
        """Hash of the model's files, the templates and the limit; where the folder lies does not matter."""
        return self._contract_hash

    def score(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        task_types: Sequence[str],
        instructions: Sequence[str | None],
    ) -> PairScores:
        """See ``PairScorer.score``: the sigmoid of the model's logit, whatever activation its config names.

        Rules compare shares of scores, so a model trained with raw logits is brought to 0 to 1 as well; the order
        of its documents stays. Pairs of similar length share a batch.

        Raises:
            DataError: a score that is not finite.
        """
        around = self._source.templates.around
        pairs = []
        for query, document, task, instruction in zip(
            queries, documents, task_types, instructions, strict=True
        ):
            before, after = around("query", task, instruction)
            pairs.append((f"{before}{query}{after}", document))
        with torch.autocast(
            self._model.device.type, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16
        ):
            found = self._model.predict(
                pairs,
                batch_size=self._source.batch_size,
                activation_fn=torch.nn.Sigmoid(),
                show_progress_bar=False,
            )
        scores = np.asarray(found, dtype=np.float32)
        if not np.isfinite(scores).all():
            bad = int((~np.isfinite(scores)).sum())
            raise DataError(
                f"cross-encoder {self._source.name!r}: {bad} of {len(scores)} scores are not finite"
            )
        return scores


def check_cross_encoder(folder: Path) -> None:
    """Refuse a folder that sentence-transformers would give a scoring head of random weights.

    Raises:
        DataError: neither a sequence classifier nor a model saved as a CrossEncoder.
    """
    own = _read(folder / "config_sentence_transformers.json").get("model_type")
    architectures = _read(folder / "config.json").get("architectures") or []
    if own != "CrossEncoder" and not any(
        name.endswith("ForSequenceClassification") for name in architectures
    ):
        raise DataError(
            f"{folder}: no cross-encoder, its config.json has architectures {architectures}; allowed: a "
            "...ForSequenceClassification with one label, or a model saved by sentence-transformers' CrossEncoder"
        )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from error
