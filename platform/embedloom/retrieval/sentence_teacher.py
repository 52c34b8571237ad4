"""Any sentence-transformers model as a teacher: Dense layers, other poolings, routers, static embeddings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from embedloom.artefacts import fingerprint
from embedloom.encoder.batching import TokenCount
from embedloom.encoder.device import DTypeName, pick_device, pick_dtype
from embedloom.encoder.foreign import read_layout
from embedloom.encoder.model import Vectors
from embedloom.encoder.own_code import SWITCH, is_trusted
from embedloom.encoder.registry import open_model
from embedloom.encoder.tokenizer import MIN_TEXT_TOKENS, CutTexts, InstructionTooLong
from embedloom.errors import DataError, one_line
from embedloom.instructions import PLAIN_TEMPLATE, Side, Templates
from embedloom.model_folder import ModelFolder
from embedloom.progress import note
from embedloom.retrieval.unit import unit_vectors

_UNIT_TOLERANCE = 1e-2  # of a length; bfloat16 keeps three digits


@dataclass(frozen=True, slots=True)
class SentenceTransformerSource:
    """A folder with ``modules.json``, run by sentence-transformers; with code beside the weights, where it is trusted.

    Vectors come out at length 1 whether or not the model ends in Normalize, because mining compares cosines.
    """

    name: str
    folder: Path
    max_query_tokens: int | None = None  # special tokens and template included; None: the model's own limit
    max_document_tokens: int | None = None
    query_template: str | None = None  # None: the model's own query prompt before the text
    document_template: str | None = None
    instructions: Mapping[str, str] | None = None  # by task type; None: the package's defaults
    batch_size: int = 32
    dtype: DTypeName = "auto"

    def open(self) -> "SentenceTransformerEmbedder":
        """Load the model.

        Raises:
            DataError: sentence-transformers cannot load the folder, or only by running its own code.
        """
        return SentenceTransformerEmbedder(self)


class SentenceTransformerEmbedder:
    """A sentence-transformers model behind the ``Embedder`` protocol."""

    def __init__(self, source: SentenceTransformerSource) -> None:
        device = pick_device()
        self._dtype = pick_dtype(source.dtype, device)
        self.model = load_offline("SentenceTransformer", source.folder, device, self._dtype)
        self._batch_size = source.batch_size
        self._name = source.name
        self._templates = _templates(source)
        own = getattr(self.model, "max_seq_length", None)
        self._limits: dict[Side, int | None] = {
            "query": source.max_query_tokens or own,
            "document": source.max_document_tokens or own,
        }
        self.cuts = CutTexts()
        # The limits as given: "the model's own" is part of the folder's fingerprint already.
        asked = [source.max_query_tokens, source.max_document_tokens]
        identity = ModelFolder(source.folder).fingerprint
        self._contract_hash = fingerprint(
            "sentence_transformers", identity, self._templates.facts(), asked, "unit"
        )

    @property
    def contract_hash(self) -> str:
        """Hash of the model's files, the templates and the limits; where the folder lies does not matter."""
        return self._contract_hash

    def embed(
        self,
        texts: Sequence[str],
        side: Side,
        task_types: Sequence[str],
        instructions: Sequence[str | None],
    ) -> tuple[Vectors, list[int]]:
        """See ``Embedder.embed``; unit vectors.

        Raises:
            InstructionTooLong: a text is cut, and what stands before it leaves next to nothing of the limit.
            DataError: a zero or non-finite vector, or a model that is not made for cosines.
        """
        self._limit(side)
        around = [
            self._templates.around(side, task_type, instruction)
            for task_type, instruction in zip(task_types, instructions, strict=True)
        ]
        vectors: list[Any] = [None] * len(texts)
        tokens = [0] * len(texts)
        for rows, prompt in self._batches(texts, around):
            given = [texts[row] + around[row][1] for row in rows]
            found, counts = self._forward(given, prompt, side)
            self._count_cuts([prompt + text for text in given], prompt, counts, side)
            self._limit(side)
            for row, vector, count in zip(rows, found, counts, strict=True):
                vectors[row], tokens[row] = vector, count
        if not vectors:
            return np.empty((0, int(self.model.get_embedding_dimension() or 0)), dtype=np.float32), []
        raw: Vectors = np.stack(vectors)
        self._check_lengths(raw)
        return unit_vectors(raw, f"teacher {self._name!r}"), tokens

    def _batches(
        self, texts: Sequence[str], around: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[list[int], str]]:
        """(rows, prompt) of similar length; one prompt a batch, since some poolings leave its tokens out."""
        by_prompt: dict[str, list[int]] = {}
        for row, (before, _) in enumerate(around):
            by_prompt.setdefault(before, []).append(row)
        for prompt, rows in by_prompt.items():
            rows.sort(key=lambda row: (-len(texts[row]), row))
            for start in range(0, len(rows), self._batch_size):
                yield rows[start : start + self._batch_size], prompt

    @torch.inference_mode()
    def _forward(self, texts: list[str], prompt: str, side: Side) -> tuple[Vectors, list[int]]:
        """Vectors [len(texts), d] as the model gives them, and tokens a text."""
        device = self.model.device
        features = self.model.preprocess(texts, prompt=prompt, task=side)
        tokens = _token_counts(features, self._name)
        moved = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in features.items()
        }
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            vectors = self.model(moved, task=side)["sentence_embedding"]
        # The model's own Matryoshka cut, from config_sentence_transformers.json; None keeps every value.
        return vectors[:, : self.model.truncate_dim].float().cpu().numpy(), tokens

    def _limit(self, side: Side) -> None:
        """Have the tokenizer cut texts at this side's limit."""
        limit, tokenizer = self._limits[side], self.model.tokenizer
        if hasattr(tokenizer, "enable_truncation"):  # static embeddings have no limit of their own
            if limit is not None and np.isfinite(limit):
                tokenizer.enable_truncation(limit)
        elif limit is not None:
            self.model.max_seq_length = limit

    def _count_cuts(self, texts: Sequence[str], prompt: str, counts: Sequence[int], side: Side) -> None:
        """Take note of what the limit left out; texts that fill it are tokenized once more, whole."""
        limit = self._limits[side]
        full = [row for row, count in enumerate(counts) if limit is not None and count >= limit]
        whole = self._token_lengths([texts[row] for row in full])
        beyond = [
            length - counts[row] for row, length in zip(full, whole, strict=True) if length > counts[row]
        ]
        self.cuts.add(CutTexts(len(texts), len(beyond), sum(counts), sum(beyond)))
        if limit is None or not beyond or not prompt:
            return
        length = self._token_lengths([prompt])[0]
        if limit - length < MIN_TEXT_TOKENS:
            raise InstructionTooLong(
                f"teacher {self._name!r}: the prompt {prompt[:60]!r} takes {length} tokens of the limit of {limit} for a "
                f"{side}, which leaves {max(0, limit - length)} to the text; allowed: max_{side}_tokens of "
                f"{length + MIN_TEXT_TOKENS} or more, or a shorter prompt"
            )

    def _token_lengths(self, texts: list[str]) -> list[int]:
        """Tokens of whole texts, special tokens included."""
        tokenizer = self.model.tokenizer
        if not texts:
            return []
        if hasattr(tokenizer, "no_truncation"):  # static embeddings; ``_limit`` sets it again
            tokenizer.no_truncation()
            return [len(one) for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
        return [len(ids) for ids in tokenizer(texts, truncation=False)["input_ids"]]

    def _check_lengths(self, vectors: Vectors) -> None:
        """Refuse a model whose lengths carry meaning: the cosine would order its documents otherwise."""
        measure = self.model.similarity_fn_name
        if measure == "cosine":
            return
        off = float(np.abs(np.linalg.norm(vectors, axis=1) - 1.0).max())
        if off > _UNIT_TOLERANCE:
            raise DataError(
                f"teacher {self._name!r}: similarity_fn_name is {measure!r} and its vectors are not of length 1 "
                f"(off by {off:.3g}); mining compares cosines, allowed: a model trained for cosine"
            )


class SentenceEncoder:
    """A model that our encoder cannot compute, behind the part of ``Encoder`` that evaluation asks for."""

    def __init__(self, folder: Path, dtype: DTypeName = "auto", threads: int | None = None) -> None:
        """Load the model.

        Raises:
            DataError: sentence-transformers cannot load the folder, or only by running its own code.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self._embedder = SentenceTransformerSource(folder.name, folder, dtype=dtype).open()
        self.contract = open_model(folder).scored_contract
        self.tokens = TokenCount()

    @property
    def cuts(self) -> CutTexts:
        """What the limits left out so far."""
        return self._embedder.cuts

    @property
    def backbone(self) -> Any:
        """The whole model, for its parameters."""
        return self._embedder.model

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self._embedder.model.truncate_dim or self._embedder.model.get_embedding_dimension())

    def embed(
        self,
        texts: Sequence[str],
        side: Side,
        task_type: str = "retrieval",
        instruction: str | Sequence[str | None] | None = None,
        max_batch_tokens: int = 0,
    ) -> Vectors:
        """As ``Encoder.embed``: float32 [len(texts), dimension]; the library's batches have rows, not tokens."""
        given = (
            [instruction] * len(texts) if instruction is None or isinstance(instruction, str) else instruction
        )
        vectors, tokens = self._embedder.embed(texts, side, [task_type] * len(texts), given)
        self.tokens.add(tokens)
        return vectors


def load_offline(
    kind: Literal["SentenceTransformer", "CrossEncoder"],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    **options: Any,
) -> Any:
    """A model of sentence-transformers out of a local folder, ready to be asked.

    On CPU the weights stay float32, for autocast to compute in ``dtype``.

    Args:
        kind: class of the library.
        folder: of the model.
        device: where it computes.
        dtype: what it computes in.
        options: further arguments of the class.

    Raises:
        DataError: the library cannot load the folder, or only by running its own code.
    """
    import sentence_transformers  # seconds, so only where a model is opened

    stored = dtype if device.type == "cuda" else torch.float32
    try:
        model = getattr(sentence_transformers, kind)(
            str(folder),
            device=str(device),
            local_files_only=True,
            trust_remote_code=is_trusted(folder),
            model_kwargs={"dtype": stored},
            **options,
        )
    except Exception as error:  # whatever the model's configs lead to: a dozen unrelated types
        raise DataError(
            f"{folder}: sentence-transformers cannot load this model ({type(error).__name__}: "
            f"{one_line(error, 300)}); code that lies beside the weights is run only by {SWITCH}"
        ) from error
    return model.eval()


def _templates(source: SentenceTransformerSource) -> Templates:
    """The given templates; where none is given, the model's prompt and the text, as the library's encode does."""
    layout = read_layout(source.folder)
    if layout.left_out:
        note("model", f"{source.name}: {layout.left_out}")
    own = Templates(
        query=layout.query_prompt + PLAIN_TEMPLATE,
        document=layout.document_prompt + PLAIN_TEMPLATE,
        symmetric=layout.default_prompt + PLAIN_TEMPLATE
        if layout.default_prompt != layout.query_prompt
        else None,
    )
    if source.query_template is not None:
        own = replace(own, query=source.query_template, symmetric=None)
    if source.document_template is not None:
        own = replace(own, document=source.document_template)
    return own if source.instructions is None else replace(own, instructions=dict(source.instructions))


def _token_counts(features: Mapping[str, Any], name: str) -> list[int]:
    if "attention_mask" in features:
        return [int(count) for count in features["attention_mask"].sum(dim=1)]
    if "offsets" in features:  # static embeddings: all tokens in one row, and where each text starts
        ends = torch.cat([features["offsets"], torch.tensor([len(features["input_ids"])])])
        return [int(count) for count in ends.diff()]
    raise DataError(
        f"teacher {name!r}: its input module gives {sorted(features)}, so tokens cannot be counted; "
        "allowed: a Transformer or StaticEmbedding"
    )
