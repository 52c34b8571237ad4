"""Local data as an mteb retrieval task: mteb ranks, scores and writes the result, as for its own tasks."""

from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from embedloom.records import content_id

MAIN_SCORE = "ndcg_at_10"
# Extra column of the queries where a task has more than one instruction; the wrapper reads it.
INSTRUCTION_COLUMN = "task_instruction"
UNKNOWN_LANGUAGE = "und-Zyyy"

# mteb names languages by ISO 639-3 and script; corpora mostly say ISO 639-1.
_LANGUAGES = {
    "ar": "ara-Arab", "bn": "ben-Beng", "cs": "ces-Latn", "da": "dan-Latn", "de": "deu-Latn",
    "el": "ell-Grek", "en": "eng-Latn", "es": "spa-Latn", "fa": "fas-Arab", "fi": "fin-Latn",
    "fr": "fra-Latn", "he": "heb-Hebr", "hi": "hin-Deva", "hu": "hun-Latn", "id": "ind-Latn",
    "it": "ita-Latn", "ja": "jpn-Jpan", "ko": "kor-Hang", "nl": "nld-Latn", "no": "nob-Latn",
    "pl": "pol-Latn", "pt": "por-Latn", "ro": "ron-Latn", "ru": "rus-Cyrl", "sv": "swe-Latn",
    "th": "tha-Thai", "tr": "tur-Latn", "uk": "ukr-Cyrl", "vi": "vie-Latn", "zh": "zho-Hans",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Query:
    """One query; an empty instruction means the model's own."""

    id: str
    text: str
    instruction: str = ""


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """Corpus, queries and qrels of one split."""

    documents: list[tuple[str, str, str]]  # id, title, text
    queries: list[Query]
    qrels: dict[str, dict[str, int]]  # query id -> document id -> grade
    languages: tuple[str, ...]
    revision: str  # hash of the content
    description: str

    def limited(self, limit: int | None) -> "RetrievalData":
        """All documents and at most ``limit`` queries, chosen by a hash of their ids."""
        if limit is None or limit >= len(self.queries):
            return self
        chosen = sorted(self.queries, key=lambda query: content_id("evaluation query", query.id))[:limit]
        queries = sorted(chosen, key=lambda query: query.id)
        qrels = {query.id: self.qrels[query.id] for query in queries}
        return replace(
            self, queries=queries, qrels=qrels, revision=content_id(self.revision, str(limit))[:16]
        )


def language_code(lang: str | None) -> str:
    """mteb's code of a language: ``en`` → ``eng-Latn``; what is unknown becomes ``und-Zyyy``."""
    if lang is None:
        return UNKNOWN_LANGUAGE
    if len(lang) == 8 and lang[3] == "-":
        return lang
    return _LANGUAGES.get(lang.lower().split("-")[0], UNKNOWN_LANGUAGE)


def make_retrieval_task(name: str, split: str, data: RetrievalData) -> AbsTaskRetrieval:
    """An mteb task over ``data``, loaded and ready to score.

    mteb finds metadata on classes, so each task is a subclass of its own.
    """
    instructions = {query.instruction for query in data.queries}
    metadata = TaskMetadata(
        name=name,
        description=data.description,
        dataset={"path": f"local/{name}", "revision": data.revision},
        type="Retrieval",
        category="t2t",
        eval_splits=[split],
        eval_langs=sorted({language_code(lang) for lang in data.languages} or {UNKNOWN_LANGUAGE}),
        main_score=MAIN_SCORE,
        prompt={"query": next(iter(instructions))}
        if len(instructions) == 1 and "" not in instructions
        else None,
        is_public=False,
    )
    task = type(f"Local_{name}", (AbsTaskRetrieval,), {"metadata": metadata})()
    task.dataset = {"default": {split: _split_data(data, several_instructions=len(instructions) > 1)}}
    task.data_loaded = True
    return task


def _split_data(data: RetrievalData, several_instructions: bool) -> dict[str, Any]:
    queries: dict[str, list[str]] = {
        "id": [query.id for query in data.queries],
        "text": [query.text for query in data.queries],
    }
    if several_instructions:
        queries[INSTRUCTION_COLUMN] = [query.instruction for query in data.queries]
    ids, titles, texts = zip(*data.documents, strict=True)
    corpus = {"id": list(ids), "title": list(titles), "text": list(texts)}
    return {
        "corpus": Dataset.from_dict(corpus),
        "queries": Dataset.from_dict(queries),
        "relevant_docs": {query: dict(grades) for query, grades in data.qrels.items()},
        "top_ranked": None,
    }
