"""An LLM as judge: it grades the rows that passed everything else; those below the threshold are refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from embedloom.compute.generation import (
    ANSWERS,
    GenerationRequest,
    GenerationResult,
    read_results,
    request_table,
    side_by_side,
)
from embedloom.compute.shards import Handling, ShardWorker, Weights, run_sharded, run_tasks
from embedloom.config.cluster import PoolConfig
from embedloom.config.synthesis import JudgeCheck
from embedloom.core.prompting import DEFAULT_INSTRUCTIONS
from embedloom.core.storage import Place
from embedloom.core.text import hash64
from embedloom.synthesis.families.base import Ask, Reject, cut, read_json
from embedloom.synthesis.prompt import Prompt, PromptRules, load_prompt
from embedloom.synthesis.refusals import Round, refusal_table, refusals_of, surviving

# An LLM as judge: it grades a row from 1 to 10, the config's threshold decides. Rows are never rewritten.


RULES = PromptRules(
    ("score",), ("query", "positive", "instruction", "task_type"), required=("query", "positive")
)


def judge_prompt(check: JudgeCheck) -> Prompt:
    """The prompt that asks for the grade.

    Raises:
        ConfigError: see load_prompt.
    """
    return load_prompt(check.prompt, RULES, "synthesis.quality.judge.prompt")


def judge_ask(row: Mapping[str, Any], document: str, prompt: Prompt, check: JudgeCheck) -> Ask:
    """The request for one row's grade.

    Args:
        row: of the pairs schema.
        document: text of its positive.
        prompt: of judge_prompt.
        check: bounds what is shown.
    """
    values = {
        "query": cut(str(row["query"]), check.max_characters),
        "positive": cut(document, check.max_characters),
        "instruction": str(row.get("instruction") or DEFAULT_INSTRUCTIONS[str(row["task_type"])]),
        "task_type": str(row["task_type"]),
    }
    return Ask(prompt.render(values), prompt.answer_schema({}))


def judge_grade(result: GenerationResult, ask: Ask) -> float | Reject:
    """The grade of an answer, or why it is none."""
    answer = read_json(result, ask)
    return answer if isinstance(answer, Reject) else float(answer["score"])


JUDGE_FOLDER = "judge"
_ROWS_FOLDER = "judged_rows"
_ROWS_FILE = "judged_rows.json"
_COLUMNS = [
    "id", "query", "positive", "negatives", "task_type", "instruction", "lang", "document_lang", "document_text",
]  # fmt: skip
ANSWER_TOKENS = 64


_ANSWERS_FOLDER = "judge_answers"


@dataclass(frozen=True, slots=True)
class Served:
    """How a model's answers are had: the class of its actors, what they are built from, and shards that one asks for at once."""

    worker: Callable[..., ShardWorker]
    arguments: dict[str, Any]
    weights: Weights
    in_flight: int


@dataclass(frozen=True)
class Judge:
    """What the pass needs; ``served`` takes the folder for the answers of an endpoint."""

    place: Place
    check: JudgeCheck
    prompt: Prompt
    pool: PoolConfig
    shard_rows: int
    served: Callable[[str], Served]


def refuse_ungraded(stage: str, judge: Judge, one: Round) -> None:
    """Write ``judge/`` of a round; what is there already is kept."""
    place = judge.place
    marker = f"{one.folder}/{_ROWS_FILE}"
    if not place.exists(marker):
        rows = sum(run_tasks(stage, _write_rows, one.groups(place), one, place))
        place.write_json(marker, {"rows": rows})
    if not place.read_json(marker)["rows"]:
        return
    served = judge.served(f"{one.folder}/{_ANSWERS_FOLDER}")
    run_sharded(
        stage=f"{stage}: judge",
        source=place,
        source_folder=f"{one.folder}/{_ROWS_FOLDER}",
        output=place.child(one.folder),
        done_folder=JUDGE_FOLDER,
        shard_rows=judge.shard_rows,
        worker=served.worker,
        worker_arguments=served.arguments,
        pool=judge.pool,
        handling=Handling(
            weights=served.weights,
            prepare=_Prepare(judge.check, judge.prompt),
            finish=_Finish(judge.check, judge.prompt),
            in_flight=served.in_flight,
        ),
    )


def _write_rows(parts: tuple[str, ...], one: Round, place: Place) -> int:
    """The rows to judge, beside the part each stands in."""
    refused = refusals_of(place, one, parts)
    total = 0
    for part in parts:
        rows = surviving(one.rows(place, part, _COLUMNS), refused[part])
        named = rows.append_column("part", pa.array([part] * rows.num_rows, pa.string()))
        place.write_table(f"{one.folder}/{_ROWS_FOLDER}/{part}", named)
        total += rows.num_rows
    return total


def _ask(row: Mapping[str, Any], check: JudgeCheck, prompt: Prompt) -> Ask:
    return judge_ask(row, row["positive"] or row["document_text"] or "", prompt, check)


@dataclass(frozen=True)
class _Prepare:
    check: JudgeCheck
    prompt: Prompt

    def __call__(self, rows: pa.Table) -> pa.Table:
        requests = []
        for row in rows.to_pylist():
            ask = _ask(row, self.check, self.prompt)
            requests.append(
                GenerationRequest(
                    row["id"],
                    ask.messages,
                    hash64(row["id"]) & 0x7FFFFFFF,
                    ANSWER_TOKENS,
                    0.0,
                    1.0,
                    ask.json_schema,
                )
            )
        return side_by_side(rows, request_table(requests))


@dataclass(frozen=True)
class _Finish:
    check: JudgeCheck
    prompt: Prompt

    def __call__(self, tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
        table = tables[ANSWERS]
        refused = []
        for row, result in zip(table.to_pylist(), read_results(table), strict=True):
            grade = judge_grade(result, _ask(row, self.check, self.prompt))
            if isinstance(grade, Reject):
                detail = f"no grade: {grade.detail}"
            elif grade < self.check.threshold:
                detail = f"graded {grade:g}, below {self.check.threshold:g}: {row['query']}"
            else:
                continue
            refused.append({"part": row["part"], "id": row["id"], "reason": "judge", "detail": detail[:200]})
        return {JUDGE_FOLDER: refusal_table(refused)}
