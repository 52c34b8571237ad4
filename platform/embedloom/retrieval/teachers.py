"""Teachers by their config section: our encoder, any sentence-transformers model, or an OpenAI-compatible endpoint."""

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from embedloom.config.mining import Teacher
from embedloom.core.artefacts import fingerprint
from embedloom.core.contents import is_trusted
from embedloom.core.model_folder import ModelFolder
from embedloom.core.progress import note
from embedloom.core.prompting import CONTRACT_FILE, DEFAULT_INSTRUCTIONS, PLAIN_TEMPLATE, Side, Templates
from embedloom.encoder.backbone import DTypeName, pick_device, pick_dtype, position_limit, read_config
from embedloom.encoder.foreign import read_layout
from embedloom.encoder.model import TokenCount, Vectors
from embedloom.encoder.own_code import SWITCH
from embedloom.encoder.registry import NodeModel, local_folder, open_model
from embedloom.encoder.tokenizer import MIN_TEXT_TOKENS, CutTexts, InstructionTooLong
from embedloom.errors import ConfigError, DataError, MissingDependency, StageError, one_line
from embedloom.retrieval.embedder import EmbedderSource, EncoderSource, unit_vectors

if TYPE_CHECKING:
    import openai


# Any OpenAI-compatible ``/v1/embeddings`` server as a teacher, through the ``openai`` client.


_TOO_LARGE = 413


@dataclass(frozen=True, slots=True)
class EndpointSource:
    """A served model. The key itself never enters this object, a manifest or a log, only its variable's name."""

    name: str
    url: str  # base address, such as http://host:8000/v1
    model: str
    templates: Templates = field(default_factory=Templates)
    api_key_env: str | None = None  # must be set where the actors run; None: the server asks for no key
    batch_size: int = 32  # texts a request
    concurrency: int = 4  # requests in flight
    timeout_seconds: float = 60.0
    max_retries: int = 5
    max_characters: int | None = None  # longer texts are cut, for servers that refuse rather than truncate

    def open(self) -> "EndpointEmbedder":
        """Prepare the client; nothing is sent yet.

        Raises:
            MissingDependency: the ``openai`` package is not installed.
            ConfigError: the key's environment variable is not set.
        """
        return EndpointEmbedder(self)


@dataclass(frozen=True, slots=True)
class _Answer:
    """Vectors in the order of the texts, the tokens they cost, and how many texts the server says it cut."""

    vectors: list[list[float]]
    tokens: int
    truncated: int

    def with_more(self, other: "_Answer") -> "_Answer":
        """This answer, and another's behind it."""
        return _Answer(
            self.vectors + other.vectors, self.tokens + other.tokens, self.truncated + other.truncated
        )


class EndpointEmbedder:
    """A served model behind the ``Embedder`` protocol.

    The client repeats what may pass (408, 409, 429, 5xx, broken connections) with growing pauses, and as long as
    the server's ``Retry-After`` says.
    """

    def __init__(self, source: EndpointSource) -> None:
        if importlib.util.find_spec("openai") is None:
            raise MissingDependency("openai", "openai", f"teacher {source.name!r}")
        import openai

        self._openai = openai
        self._source = source
        self._dimension: int | None = None
        self.cuts = CutTexts()
        self._client = openai.OpenAI(
            base_url=source.url,
            api_key=_key(source),
            timeout=source.timeout_seconds,
            max_retries=source.max_retries,
        )

    @property
    def contract_hash(self) -> str:
        """Hash of model name, templates and cut; the same model moved to another address keeps its hash."""
        source = self._source
        return fingerprint("openai", source.model, source.templates.facts(), source.max_characters, "unit")

    def embed(
        self,
        texts: Sequence[str],
        side: Side,
        task_types: Sequence[str],
        instructions: Sequence[str | None],
    ) -> tuple[Vectors, list[int]]:
        """See ``Embedder.embed``; unit vectors.

        The server counts tokens by request, so those of a request are spread evenly over its texts: only their sum
        is exact. It is 0 where the server reports no usage. ``cuts`` counts the texts cut at ``max_characters``, with what
        was left out of them estimated by the others' characters a token, and those that the server says it cut
        (``usage.truncated_items``, as an embedloom endpoint does), with at least one token each; what a server cuts without
        a word cannot be known.

        Raises:
            DataError: an answer without exactly one finite vector of one dimension per text, or texts it refuses.
            ConfigError: the server knows no such model or address, or refuses the key.
            StageError: it cannot be reached, or still fails after the last retry.
        """
        given = [self._text(*row, side=side) for row in zip(texts, task_types, instructions, strict=True)]
        size = self._source.batch_size
        batches = [given[start : start + size] for start in range(0, len(given), size)]
        if not batches:
            return np.empty((0, self._dimension or 0), dtype=np.float32), []
        with ThreadPoolExecutor(self._source.concurrency) as threads:
            answers = list(threads.map(self._request, batches))
        vectors: Vectors = self._stack([vector for answer in answers for vector in answer.vectors])
        tokens = [
            count
            for batch, answer in zip(batches, answers, strict=True)
            for count in _spread(answer.tokens, len(batch))
        ]
        self._count_cuts(texts, given, sum(tokens), sum(answer.truncated for answer in answers))
        return unit_vectors(vectors, self._label), tokens

    @property
    def _label(self) -> str:
        return f"teacher {self._source.name!r} at {self._source.url}"

    def _text(self, text: str, task_type: str, instruction: str | None, *, side: Side) -> str:
        before, after = self._source.templates.around(side, task_type, instruction)
        # The API refuses empty strings; a blank is the shortest text there is.
        return (before + text[: self._source.max_characters] + after) or " "

    def _count_cuts(self, texts: Sequence[str], given: Sequence[str], tokens: int, truncated: int) -> None:
        limit = self._source.max_characters
        beyond = [len(text) - limit for text in texts if limit is not None and len(text) > limit]
        rate = tokens / max(1, sum(map(len, given)))
        left_out = sum(max(1, round(characters * rate)) for characters in beyond) + truncated
        self.cuts.add(CutTexts(len(texts), min(len(texts), len(beyond) + truncated), tokens, left_out))

    def _request(self, texts: list[str]) -> _Answer:
        """What the server answers; a request that is too large for it goes as two."""
        try:
            answer = self._client.embeddings.create(
                model=self._source.model, input=texts, encoding_format="float"
            )
        except self._openai.APIStatusError as error:
            if error.status_code == _TOO_LARGE and len(texts) > 1:
                half = len(texts) // 2
                return self._request(texts[:half]).with_more(self._request(texts[half:]))
            raise self._refusal(error) from error
        except self._openai.APIError as error:
            tries = self._source.max_retries + 1
            raise StageError(
                f"{self._label}: no answer after {tries} tries ({type(error).__name__}: {error})"
            ) from error
        usage = getattr(answer, "usage", None)
        tokens, truncated = (int(getattr(usage, key, 0) or 0) for key in ("prompt_tokens", "truncated_items"))
        return _Answer(self._in_order(getattr(answer, "data", None), len(texts)), tokens, truncated)

    def _in_order(self, data: Any, wanted: int) -> list[list[float]]:
        items = sorted(data or [], key=lambda item: -1 if item.index is None else item.index)
        if [item.index for item in items] != list(range(wanted)):
            seen = [item.index for item in items][:8]
            raise DataError(
                f"{self._label}: answered {len(items)} vectors for {wanted} texts (indices {seen}); "
                "expected one each, with index 0 to n-1"
            )
        if not all(isinstance(item.embedding, list) for item in items):
            raise DataError(
                f"{self._label}: answered vectors that are no lists of numbers, though asked for float"
            )
        return [item.embedding for item in items]

    def _stack(self, vectors: list[list[float]]) -> Vectors:
        sizes = sorted(
            {len(vector) for vector in vectors} | ({self._dimension} if self._dimension else set())
        )
        if len(sizes) != 1:
            raise DataError(f"{self._label}: vectors of dimensions {sizes}; all must have the same")
        self._dimension = sizes[0]
        return np.array(vectors, dtype=np.float32)

    def _refusal(self, error: "openai.APIStatusError") -> Exception:
        status = error.status_code
        said = f"{self._label}: HTTP {status}: {one_line(error.message, 300)}"
        if status in (401, 403):
            return ConfigError(f"{said}; the key is taken from api_key_env: {self._source.api_key_env!r}")
        if status == 404:
            return ConfigError(
                f"{said}; model is {self._source.model!r}, url must end where /embeddings follows"
            )
        if status in (408, 409, 429) or status >= 500:
            return StageError(f"{said}, after {self._source.max_retries + 1} tries")
        return DataError(f"{said}; batch_size and max_characters make requests smaller")


def _key(source: EndpointSource) -> str:
    if source.api_key_env is None:
        return "none"  # given, or the client would send OPENAI_API_KEY to whatever server this is
    key = os.environ.get(source.api_key_env)
    if not key:
        raise ConfigError(
            f"teacher {source.name!r}: the environment variable {source.api_key_env!r} (api_key_env) is not set where "
            "this actor runs"
        )
    return key


def _spread(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` whole numbers as equal as can be."""
    return [total // parts + (part < total % parts) for part in range(parts)]


# Any sentence-transformers model as a teacher: Dense layers, other poolings, routers, static embeddings.


_UNIT_TOLERANCE = 1e-2  # of a length; bfloat16 keeps three digits


@dataclass(frozen=True, slots=True)
class SentenceTransformerSource:
    """A folder with ``modules.json``, run by sentence-transformers; with code beside the weights, where it is trusted.

    Vectors come out at length 1 whether or not the model ends in Normalize, because mining compares cosines.
    """

    name: str
    folder: Path | NodeModel
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
        folder = local_folder(source.folder)
        self._dtype = pick_dtype(source.dtype, device)
        self.model = load_offline("SentenceTransformer", folder, device, self._dtype)
        self._batch_size = source.batch_size
        self._name = source.name
        self._templates = _templates(source, folder)
        own = getattr(self.model, "max_seq_length", None)
        self._limits: dict[Side, int | None] = {
            "query": source.max_query_tokens or own,
            "document": source.max_document_tokens or own,
        }
        self.cuts = CutTexts()
        # The limits as given: "the model's own" is part of the folder's fingerprint already.
        asked = [source.max_query_tokens, source.max_document_tokens]
        identity = ModelFolder(folder).fingerprint
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
        max_batch_tokens: int | None = None,
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


def _templates(source: SentenceTransformerSource, folder: Path) -> Templates:
    """The given templates; where none is given, the model's prompt and the text, as the library's encode does."""
    layout = read_layout(folder)
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


# From the config section of a teacher to what opens it: our encoder, sentence-transformers, or an endpoint.


def teacher_source(
    teacher: Teacher,
    *,
    max_query_tokens: int | None = None,
    max_document_tokens: int | None = None,
    instructions: Mapping[str, str] | None = None,
) -> EmbedderSource:
    """What opens this teacher; a model of the hub is fetched here, as its limits are checked, and by each node that opens it.

    Args:
        teacher: its section.
        max_query_tokens: limit where the section has none; None: the model's own. An endpoint cuts by itself.
        max_document_tokens: the same of documents.
        instructions: by task type, where they differ from the package's defaults.

    Raises:
        ConfigError: an engine that does not fit the model, or a limit above its positions.
        DataError: no such model.
    """
    named = {key: text for key, text in (instructions or {}).items() if text != DEFAULT_INSTRUCTIONS.get(key)}
    if teacher.engine == "openai":
        return _endpoint(teacher, named)
    model = open_model(teacher_model(teacher))
    limits = {
        "max_query_tokens": teacher.max_query_tokens or max_query_tokens,
        "max_document_tokens": teacher.max_document_tokens or max_document_tokens,
    }
    check_positions(teacher.model, model, limits)
    if pick_engine(teacher, model) == "encoder":
        own = model.contract
        changes: dict[str, Any] = {key: limit for key, limit in limits.items() if limit is not None}
        contract = own.model_copy(update={**changes, "instructions": {**own.instructions, **named}})
        return EncoderSource(teacher.model, model.travels, contract, teacher.dtype)
    return SentenceTransformerSource(
        name=teacher.model,
        folder=model.travels,
        query_template=teacher.query_template,
        document_template=teacher.document_template,
        instructions={**DEFAULT_INSTRUCTIONS, **named},
        batch_size=teacher.batch_size,
        dtype=teacher.dtype,
        **limits,
    )


def teacher_model(teacher: Teacher) -> NodeModel:
    """A teacher's weights, by what every node finds them."""
    return NodeModel.of(teacher.model, teacher.trust_remote_code)


def pick_engine(teacher: Teacher, model: ModelFolder) -> str:
    """``encoder`` or ``sentence_transformers``.

    Raises:
        ConfigError: the engine asked for would compute something else than the model, or templates for a model with
            a contract of its own.
    """
    templates = teacher.query_template is not None or teacher.document_template is not None
    if model.layout is None:
        if templates and teacher.engine == "auto":
            raise ConfigError(
                f"teacher {teacher.model!r}: query_template and document_template do not fit, its {CONTRACT_FILE} has a template"
            )
        return "sentence_transformers" if teacher.engine == "sentence_transformers" else "encoder"
    if teacher.engine == "sentence_transformers":
        return teacher.engine
    reason = model.beyond
    if teacher.engine == "encoder" and reason:
        raise ConfigError(
            f"teacher {teacher.model!r}: engine 'encoder' cannot run it: {reason}; allowed: 'auto', 'sentence_transformers'"
        )
    return "sentence_transformers" if reason or templates else "encoder"


def check_positions(name: str, model: ModelFolder, limits: Mapping[str, int | None]) -> None:
    """Raise ConfigError for a limit (by the name of its key) above the positions that a model has."""
    if not (model.transformer / "config.json").is_file():
        return  # static embeddings have no positions
    positions = position_limit(read_config(model.transformer).get_text_config())
    for key, limit in limits.items():
        if positions is not None and limit is not None and limit > positions:
            raise ConfigError(f"{key}: {limit} is above the {positions} positions of {name!r}")


def _endpoint(teacher: Teacher, named: Mapping[str, str]) -> EndpointSource:
    if teacher.url is None:  # refused by the config section already
        raise ConfigError(f"teacher {teacher.model!r}: engine openai needs url")
    return EndpointSource(
        name=teacher.model,
        url=teacher.url,
        model=teacher.model,
        templates=Templates(
            query=teacher.query_template or PLAIN_TEMPLATE,
            document=teacher.document_template or PLAIN_TEMPLATE,
            instructions={**DEFAULT_INSTRUCTIONS, **named},
        ),
        api_key_env=teacher.api_key_env,
        batch_size=teacher.batch_size,
        concurrency=teacher.concurrency,
        timeout_seconds=teacher.timeout_seconds,
        max_retries=teacher.max_retries,
        max_characters=teacher.max_characters,
    )
