"""Local tasks on disk: where their files lie, BEIR folders too, and languages as mteb names them (``eng-Latn``).

Light: what a command checks before it starts anything, so no mteb here.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from embedloom.core.storage import Place, located
from embedloom.errors import DataError

UNKNOWN_LANGUAGE = "und-Zyyy"
_CODE_LENGTH = 8  # of "eng-Latn"
_REGION_SCRIPTS = {"zho-TW": "Hant", "zho-HK": "Hant"}


def language_code(lang: str | None) -> str:
    """mteb's code of a language: ``en``, ``eng`` and ``eng-GB`` give ``eng-Latn``; what is unknown ``und-Zyyy``.

    Scripts are the ones that mteb's own tasks use most for a language.
    """
    if lang is None:
        return UNKNOWN_LANGUAGE
    if len(lang) == _CODE_LENGTH and lang[3] == "-" and lang[4].isupper() and lang[5:].islower():
        return lang
    base = lang.split("-")[0].lower()
    code = _table("iso_639_1_to_3.json").get(base, base)
    code = "nob" if code == "nor" else code  # mteb's tasks tell Bokmål from Nynorsk
    script = _REGION_SCRIPTS.get(lang) or _table("iso_639_3_to_default_script.json").get(code)
    return f"{code}-{script}" if script else UNKNOWN_LANGUAGE


def same_language(one: str, other: str) -> bool:
    """Whether two codes name one language, whatever their script or region."""
    return language_code(one)[:3] == language_code(other)[:3] != UNKNOWN_LANGUAGE[:3] or one == other


@cache
def _table(name: str) -> dict[str, str]:
    """A table that mteb ships."""
    content: dict[str, str] = json.loads(resources.files("mteb.languages").joinpath(name).read_text("utf-8"))
    return content


# Where local tasks lie: ``retrieval/<name>/{corpus,queries,qrels}.parquet``, ``<type>/<name>.parquet``, BEIR folders.
#
# Light: what a command checks before it starts anything, so no mteb here.


LocalType = Literal[
    "retrieval", "reranking", "classification", "sts", "pair_classification", "bitext", "clustering"
]
RANKED_TYPES: tuple[LocalType, ...] = ("retrieval", "reranking")
TABLE_TYPES: tuple[LocalType, ...] = ("classification", "sts", "pair_classification", "bitext", "clustering")
CORPUS, QUERIES, QRELS, QRELS_TO_ENGLISH = (
    f"{name}.parquet" for name in ("corpus", "queries", "qrels", "qrels_to_eng")
)
_TO_ENGLISH = "-to-eng"
BEIR_CORPUS, BEIR_QUERIES = "corpus.jsonl", "queries.jsonl"
_SPLIT_COLUMN = "split"
TRAIN_SPLIT = "train"  # what a classification task's classifier is fitted on


@dataclass(frozen=True, slots=True)
class LocalTask:
    """One task on disk."""

    name: str
    type: LocalType
    path: str  # a folder for retrieval and reranking, else a file
    qrels: str = QRELS

    @property
    def files(self) -> list[Path]:
        """What it is read from."""
        root = located(self.path)
        return (
            [root / name for name in (CORPUS, QUERIES, self.qrels)] if self.type in RANKED_TYPES else [root]
        )

    @property
    def queries(self) -> Path:
        """The file whose rows belong to splits: the queries, or all there is."""
        return located(self.path) / QUERIES if self.type in RANKED_TYPES else located(self.path)

    def named(self, name: str) -> str:
        """The name under which one task (with its cross-lingual half) is reported."""
        return f"{name}{_TO_ENGLISH}" if self.qrels == QRELS_TO_ENGLISH else name


def find_local_tasks(path: Path, where: str) -> list[LocalTask]:
    """The task at ``path``, or all tasks of a folder, sorted by type and name.

    ``qrels_to_eng.parquet`` beside the qrels makes a second task, ``<name>-to-eng``.

    Raises:
        DataError: nothing there, no task in it, or a task without one of its files.
    """
    if not path.exists():
        raise DataError(f"{where}: {path} does not exist")
    found = _at(path, where)
    if not found:
        raise DataError(
            f"{where}: {path} holds no task; expected {'|'.join(RANKED_TYPES)}/<name>/{CORPUS} or "
            f"{'|'.join(TABLE_TYPES)}/<name>.parquet"
        )
    return found


def _at(path: Path, where: str) -> list[LocalTask]:
    if path.is_file():
        return [_table_task(path, where)]
    if any((path / name).is_file() for name in (CORPUS, QUERIES, QRELS)):
        return _ranked_task(path, where)
    if path.name in RANKED_TYPES:
        return [
            task
            for folder in sorted(path.iterdir())
            if folder.is_dir()
            for task in _ranked_task(folder, where)
        ]
    if path.name in TABLE_TYPES:
        return [_table_task(file, where) for file in sorted(path.glob("*.parquet"))]
    kinds = [path / kind for kind in (*RANKED_TYPES, *TABLE_TYPES) if (path / kind).is_dir()]
    return [task for folder in kinds for task in _at(folder, where)]


def _table_task(path: Path, where: str) -> LocalTask:
    kind = next((kind for kind in TABLE_TYPES if path.parent.name == kind), None)
    if kind is None or path.suffix != ".parquet":
        raise DataError(
            f"{where}: {path} must be a .parquet file in a folder named after its type: {', '.join(TABLE_TYPES)}"
        )
    return LocalTask(path.stem, kind, str(path.absolute()))


def _ranked_task(folder: Path, where: str) -> list[LocalTask]:
    for name in (CORPUS, QUERIES, QRELS):
        if not (folder / name).is_file():
            raise DataError(
                f"{where}: {folder / name} is missing; a retrieval or reranking task has {CORPUS}, {QUERIES} and {QRELS}"
            )
    kind: LocalType = "reranking" if folder.parent.name == "reranking" else "retrieval"
    tasks = [LocalTask(folder.name, kind, str(folder.absolute()))]
    if (folder / QRELS_TO_ENGLISH).is_file():
        tasks.append(LocalTask(f"{folder.name}{_TO_ENGLISH}", kind, str(folder.absolute()), QRELS_TO_ENGLISH))
    return tasks


def check_local_split(task: LocalTask, split: str, where: str) -> None:
    """Raise DataError naming the splits that a task has, if ``split`` is none of them; reads one column."""
    file = task.queries
    place = Place(str(file.parent))
    if _SPLIT_COLUMN not in place.parquet_footer(file.name)[0].names:
        return  # the reader names all columns that are missing
    there = sorted(set(place.read_table(file.name, [_SPLIT_COLUMN]).column(_SPLIT_COLUMN).to_pylist()))
    for wanted in (split, TRAIN_SPLIT) if task.type == "classification" else (split,):
        if wanted not in there:
            raise DataError(f"{where}: {file}: no row of split {wanted!r}; the file has {there}")


def check_beir(folder: Path, split: str, where: str) -> None:
    """Raise DataError naming the first file of the BEIR layout that is missing, and the splits there are."""
    for name in (BEIR_CORPUS, BEIR_QUERIES, f"qrels/{split}.tsv"):
        if not (folder / name).is_file():
            there = sorted(path.stem for path in folder.glob("qrels/*.tsv"))
            splits = f"; splits found: {', '.join(there)}" if there else ""
            raise DataError(
                f"{where}: {folder / name} is missing; a BEIR folder has {BEIR_CORPUS}, {BEIR_QUERIES} "
                f"and qrels/{split}.tsv{splits}"
            )
