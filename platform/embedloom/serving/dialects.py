"""Other vendors' routes: Cohere's embed, and those of Text Embeddings Inference."""

import uuid
from dataclasses import asdict, replace
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Request, Response
from pydantic import AfterValidator, Field, PlainValidator, RootModel, ValidationInfo, WithJsonSchema

from embedloom import __version__
from embedloom.core.prompting import Side
from embedloom.core.schemas import TASK_TYPES
from embedloom.serving.calls import Calls, notes_of, pinned, terms_of
from embedloom.serving.encodings import check_packable, encode_vectors
from embedloom.serving.routes import (
    RankRoutes,
    Routes,
    embedded,
    finished,
    json_reply,
    similarities,
)
from embedloom.serving.schemas import (
    BAD_ITEMS,
    INPUT_SCHEMA,
    TEXT_SCHEMA,
    TEXTS_SCHEMA,
    ClosedRequest,
    CohereMeta,
    Count,
    Encoding,
    Integer,
    Query,
    Reply,
    RerankRequest,
    TextOptions,
    Texts,
    TokenizeRequest,
    TruncateField,
    check_input,
    check_strings,
    check_texts,
    cohere_meta,
    harmless,
    refuse,
)

# Cohere's embed, versions 1 and 2: its requests, its replies, its handler. Its rerank is rank_routes.py's own shape.


# What Cohere calls an input, as side and task type.
_INPUT_TYPES: dict[str, tuple[Side, str | None]] = {
    "search_query": ("query", None),
    "search_document": ("document", None),
    "classification": ("document", "classification"),
    "clustering": ("document", "clustering"),
}


class CohereEmbedRequest(TextOptions):
    """``POST /v1/embed`` and ``/v2/embed``, as Cohere has them."""

    usual_truncation: ClassVar[Literal["none", "start", "end"]] = "end"  # as Cohere's
    mark: ClassVar[str] = "texts"

    model: str = Field(min_length=1)
    texts: Texts = Field(description=BAD_ITEMS)
    input_type: Literal["search_query", "search_document", "classification", "clustering"] | None = Field(
        default=None, description="Null: the side and task of the model name, else a document."
    )
    embedding_types: list[Encoding] | None = Field(
        default=None,
        min_length=1,
        description=(
            "Null: numbers. int8 and uint8 fill each vector's own range; ubinary packs eight dimensions into a byte, binary "
            "is that less 128; base64 is of float32."
        ),
    )
    output_dimension: Count | None = Field(
        default=None, description="Only for models trained for it (Matryoshka)."
    )
    truncate: TruncateField = Field(default="end", description="Not given: as for /v1/rerank.")
    max_tokens: Count | None = harmless("Cohere; the model's own limit cuts")
    priority: Integer | None = harmless("Cohere")

    @property
    def prompt_said(self) -> tuple[Side | None, str | None]:
        """Side and task that the request itself names."""
        side, task = _INPUT_TYPES.get(self.input_type or "", (None, None))
        other_side, other_task = super().prompt_said
        return side or other_side, other_task or task


class CohereEmbedResponse(Reply):
    """Reply of Cohere's embed: plain lists of numbers in version 1 where no types are asked for, else one list a type."""

    id: str
    response_type: Literal["embeddings_floats", "embeddings_by_type"]
    embeddings: list[list[float]] | dict[Encoding, list[list[float]] | list[list[int]] | list[str]]
    texts: list[str]
    meta: CohereMeta


class CohereRoutes:
    """Cohere's handlers over one endpoint's encoder."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def cohere_embed(self, http: Request) -> Response:
        """Embed texts (Cohere's shape); input_type search_query is our query side."""
        return await self.answer(http, await self._calls.read(http, CohereEmbedRequest))

    async def answer(self, http: Request, request: CohereEmbedRequest) -> Response:
        """Embed what was read, in the version that the path names."""
        dimension = request.output_dimension
        vectors, result = await embedded(
            self._calls, http, request, "texts", "output_dimension", dimension, None
        )
        version = "2" if http.url.path.endswith("/v2/embed") else "1"
        by_type = request.embedding_types is not None or version == "2"
        kinds: list[Encoding] = request.embedding_types or ["float"]
        check_packable(vectors.shape[1], set(kinds), "embedding_types")
        embeddings: Any = {kind: encode_vectors(vectors, kind) for kind in kinds}
        body = {
            "id": uuid.uuid4().hex,
            "response_type": "embeddings_by_type" if by_type else "embeddings_floats",
            "embeddings": embeddings if by_type else embeddings["float"],
            "texts": request.texts,
            "meta": cohere_meta(version, {"input_tokens": result.tokens}, result.truncated),
        }
        return json_reply(body, headers=notes_of(result))


# Text Embeddings Inference's routes: their requests, replies and handlers (huggingface/text-embeddings-inference 1.9).
#
# Its own shapes, also at paths that we share with it: a body with ``inputs`` or ``texts`` is TEI's.


# Routes of TEI that this endpoint does not have, and what it says to who asks for them.
# Why a path is not there, by its end; one that this endpoint has is asked for as it is spelt.
NOT_OFFERED = {
    "/search": "this endpoint serves no corpus; serving.corpus, or embedloom serve --corpus VECTORS, names one",
    "/files": "this endpoint takes no batches; serving.batches.folder says where they lie",
    "/batches": "this endpoint takes no batches; serving.batches.folder says where they lie",
    "/embed_all": "one vector a text is all there is; ask /embed",
    "/embed_sparse": "vectors are dense; ask /embed",
    "/predict": "the model is no classifier; /rerank and /similarity compare texts",
    "/decode": "token ids are not turned back into text; /tokenize gives them with the text of each",
}

_Direction = Literal["left", "right", "Left", "Right"]
_PROMPTS: dict[str, tuple[Side | None, str | None]] = {
    "query": ("query", None),
    "document": ("document", None),
    "passage": ("document", None),
    **{task: ("query", task) for task in TASK_TYPES},
}


def _known_prompt(name: str, info: ValidationInfo) -> str:
    allowed = (*_PROMPTS, *(info.context or {}).get("tasks", ()))
    if name not in allowed:
        raise refuse(f"prompt_name: {name!r:.80} is unknown; allowed: {', '.join(allowed)}")
    return name


_PROMPT = (
    "query, document, passage, a task type or one of the model's tasks, as a query; null: as a document."
)
_PromptName = Annotated[
    str, AfterValidator(_known_prompt), WithJsonSchema({"type": "string", "enum": list(_PROMPTS)})
]
_Inputs = Annotated[
    list[str] | list[list[int]],
    PlainValidator(lambda value: check_input(value, "inputs")),
    WithJsonSchema(INPUT_SCHEMA),
]


def _text_or_texts(value: Any) -> list[str]:
    return check_texts([value] if isinstance(value, str) else value, "inputs")


_TokenizedTexts = Annotated[
    list[str], PlainValidator(_text_or_texts), WithJsonSchema({"oneOf": [TEXT_SCHEMA, TEXTS_SCHEMA]})
]
_Sentences = Annotated[
    list[str], PlainValidator(lambda value: check_texts(value, "sentences")), WithJsonSchema(TEXTS_SCHEMA)
]
_RankedTexts = Annotated[
    list[str],
    PlainValidator(lambda value: check_strings(value, "texts")),
    WithJsonSchema({"type": "array", "minItems": 1, "items": {"type": "string"}}),
]


class _TeiOptions(TextOptions):
    """What TEI's requests may say of their texts."""

    truncate: TruncateField = Field(
        default="none", description="Not given: the operator's default, else none."
    )
    truncation_direction: _Direction = Field(default="right", description="left cuts the beginning.")
    prompt_name: _PromptName | None = Field(default=None, description=_PROMPT)

    @property
    def cuts_start(self) -> bool:
        """Whether the request wants the beginning cut where a text is cut at all, whoever says that it is."""
        return self.truncation_direction.lower() == "left"

    @property
    def prompt_said(self) -> tuple[Side | None, str | None]:
        """Side and task that the request itself names."""
        if self.prompt_name is None:
            return super().prompt_said
        side, task = _PROMPTS.get(
            self.prompt_name, ("query", self.prompt_name)
        )  # else a task of the model's own
        return side, super().prompt_said[1] or task


class TeiEmbedRequest(_TeiOptions):
    """``POST /embed``, and ``POST /`` as TEI's clients call it."""

    mark: ClassVar[str] = "inputs"

    inputs: _Inputs = Field(description=f"Texts, or token ids of this model's own tokenizer. {BAD_ITEMS}")
    normalize: Literal[True] = Field(
        default=True, description="Vectors of unit length are all there is here."
    )
    dimensions: Count | None = Field(default=None, description="Only for models trained for it (Matryoshka).")


class TeiRerankRequest(_TeiOptions):
    """``POST /rerank`` as TEI has it; scores are similarities, raw or not. Blank texts rank last, as for /v1/rerank."""

    mark: ClassVar[str] = "texts"

    query: Query
    texts: _RankedTexts = Field(description="A blank one ranks last.")
    raw_scores: bool | None = harmless("TEI; scores are similarities")
    return_text: bool = False


class TeiSentences(ClosedRequest):
    """A sentence and those that it is compared with."""

    source_sentence: str = Field(min_length=1)
    sentences: _Sentences


class TeiSimilarityRequest(ClosedRequest):
    """``POST /similarity``: all sentences are embedded alike, as documents unless ``prompt_name`` says otherwise."""

    inputs: TeiSentences
    parameters: _TeiOptions = Field(default_factory=_TeiOptions)


class TeiTokenizeRequest(_TeiOptions):
    """``POST /tokenize`` as TEI has it."""

    mark: ClassVar[str] = "inputs"

    inputs: _TokenizedTexts
    add_special_tokens: bool = True


class TeiEmbeddings(RootModel[list[list[float]]]):
    """Reply of ``POST /embed``: a vector a text."""


class TeiRank(Reply):
    """One text: its place in the request and its score."""

    index: int
    score: float
    text: str | None = None


class TeiRanking(RootModel[list[TeiRank]]):
    """Reply of TEI's ``POST /rerank``, best first."""


class TeiSimilarities(RootModel[list[float]]):
    """Reply of ``POST /similarity``, in the order of the request."""


class TeiToken(Reply):
    """One token; ``start`` and ``stop`` are characters of the prompted text."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class TeiTokens(RootModel[list[list[TeiToken]]]):
    """Reply of TEI's ``POST /tokenize``."""


class TeiInfo(Reply):
    """Reply of ``GET /info``."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: dict[Literal["embedding"], dict[Literal["pooling"], str]]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None


class TeiRoutes:
    """TEI's handlers over one endpoint's encoder, and those of the paths that several dialects share."""

    def __init__(self, calls: Calls, plain: Routes, rank: RankRoutes, cohere: CohereRoutes) -> None:
        self._calls = calls
        self._plain = plain
        self._rank = rank
        self._cohere = cohere

    async def tei_embed(self, http: Request) -> Response:
        """Embed texts (TEI's shape)."""
        return await self._embed(http, await self._calls.read(http, TeiEmbedRequest))

    async def embed_at_root(self, http: Request) -> Response:
        """Embed texts, for clients that post to the base URL itself: TEI's (inputs), LiteLLM's for Cohere (texts)."""
        request = await self._calls.read(http, TeiEmbedRequest, CohereEmbedRequest)
        if isinstance(request, CohereEmbedRequest):
            return await self._cohere.answer(http, request)
        return await self._embed(http, request)

    async def _embed(self, http: Request, request: TeiEmbedRequest) -> Response:
        vectors, result = await embedded(
            self._calls, http, request, "inputs", "dimensions", request.dimensions, True
        )
        return json_reply(vectors.tolist(), headers=notes_of(result))

    async def rerank_at_root(self, http: Request) -> Response:
        """Order texts by their similarity to a query: TEI's shape (texts), or that of /v1/rerank (documents)."""
        request = await self._calls.read(http, RerankRequest, TeiRerankRequest)
        if isinstance(request, RerankRequest):
            # LiteLLM's infinity/ takes a document only as a string here, its hosted_vllm/ only as an object, and both ask alike.
            return await self._rank.ranked(http, request, with_documents=False)
        terms = self._rank.rank_terms(request)
        ranking = await self._rank.ranking(
            http, terms, request.query, request.texts, "texts", request.contract_hash
        )
        body: list[dict[str, Any]] = []
        for index in ranking.best:
            text = {"text": request.texts[index]} if request.return_text else {}
            body.append({"index": index, "score": float(ranking.scores[index]), **text})
        return json_reply(body, headers=notes_of(ranking.result))

    async def tei_similarity(self, http: Request) -> Response:
        """How similar sentences are to one (TEI's shape)."""
        calls = self._calls
        request = await calls.read(http, TeiSimilarityRequest)
        terms = terms_of(request.parameters, calls.settings)
        source, sentences = request.inputs.source_sentence, request.inputs.sentences
        calls.check_sizes([source], "source_sentence", is_list=False)
        calls.check_sizes(sentences, "sentences")
        info = await calls.info()
        parts = (
            terms.texts([source], terms.side, "source_sentence", is_list=False),
            terms.texts(sentences, terms.side, "sentences"),
        )
        pin = pinned(http, request.parameters.contract_hash)
        result = await calls.encode(http, terms.job(*parts, contract_hash=pin))
        vectors = finished(result.vectors, None, True, info.normalize)
        return json_reply(similarities(vectors[0], vectors[1:], True).tolist(), headers=notes_of(result))

    async def tokenize_either(self, http: Request) -> Response:
        """The tokens of a text: TEI's shape (inputs), or ours (input), prompted as /v1/embeddings would."""
        calls = self._calls
        request = await calls.read(http, TokenizeRequest, TeiTokenizeRequest)
        if isinstance(request, TokenizeRequest):
            return await self._plain.tokenized(http, request)
        terms = terms_of(request, calls.settings)
        calls.check_sizes(request.inputs, "inputs")
        part = terms.texts(request.inputs, terms.side, "inputs")
        job = terms.job(part, contract_hash=pinned(http, request.contract_hash))
        # Its clients count and chunk by it, so an operator's default does not cut here, as TEI's --auto-truncate does not.
        cut = request.truncation_said or "none"
        result = await calls.tokenize(http, replace(job, pieces=True, truncate=cut))
        body = [
            [asdict(piece) for piece in pieces if request.add_special_tokens or not piece.special]
            for pieces in result.pieces or ()
        ]
        return json_reply(body, headers=notes_of(result))

    async def info(self, _: Request) -> Response:
        """What the endpoint is, as TEI says it."""
        settings, model = self._calls.settings, await self._calls.info()
        info = TeiInfo(
            model_id=settings.served_name,
            model_sha=settings.fingerprint,
            model_dtype=settings.compute_dtype,
            model_type={"embedding": {"pooling": model.pooling}},
            max_concurrent_requests=settings.max_requests,
            max_input_length=model.max_document_tokens,
            max_batch_tokens=settings.max_batch_tokens,
            max_batch_requests=None,
            max_client_batch_size=settings.max_items,
            auto_truncate=settings.truncate in ("start", "end"),
            tokenization_workers=1,
            version=__version__,
            sha=None,
            docker_label=None,
        )
        return json_reply(info.model_dump())
