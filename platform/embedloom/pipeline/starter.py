"""A first run config for somebody's own documents: what a look at them shows, and a few choices, as commented YAML."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from embedloom.config.base import validate
from embedloom.config.run import RunConfig
from embedloom.core.language import language_of
from embedloom.corpus.inspection import Inspected
from embedloom.errors import DataError

FEWEST_ROWS = 20  # of fewer, a held-out split and negatives beside the positives cannot be drawn
_CHARACTERS_PER_TOKEN = 4  # of English; fewer elsewhere, and then texts are cut a little earlier
# Encoders of the registry are trained as they are, with the templates that they know.
_ENCODERS = {
    "minilm-l6": '\n  template: "{text}"  # it never saw instructions',
    "all-mpnet-base-v2": '\n  template: "{text}"  # it never saw instructions',
    "multilingual-e5-small": (
        '\n  template: "query: {text}"  # as it was trained\n  document_template: "passage: {text}"'
    ),
}
_MULTILINGUAL = "multilingual-e5-small"
# Learning rate and temperature of those that the usual ones would spoil: cosines of e5 lie between 0.7 and 1, as it was trained at
# 0.01. On 427 German documents the usual ones took nDCG@10 from .856 to .828 in 93 steps, these in 39 to .861.
_RATES = {_MULTILINGUAL: ("2.0e-5", "0.02")}
_SMALL_GENERATORS = ("smollm2-135m", "qwen2.5-coder-0.5b")
_READS_ENGLISH = ("minilm-l6", "all-mpnet-base-v2", "smollm2-135m")


@dataclass(frozen=True, slots=True)
class Budget:
    """How much work a run is.

    Attributes:
        limit: rows read of each source; None: all.
        written: rows that LLMs write.
        most_steps: optimiser steps at most; few pairs need fewer.
        batch: queries per step.
        tokens: longest document that the models read.
    """

    limit: int | None
    written: int
    most_steps: int
    batch: int
    tokens: int


BUDGETS: dict[str, Budget] = {
    "small": Budget(limit=5_000, written=64, most_steps=100, batch=16, tokens=128),
    "medium": Budget(limit=None, written=2_000, most_steps=1_000, batch=32, tokens=256),
}
_USUAL_LEAST = 50  # characters; the default of corpus.min_characters
_FEWEST_STEPS = 10
_EPOCHS = 3  # over the pairs, where the budget allows it
_HELD_OUT_ROWS = 300  # enough for a confidence interval of some +-0.04 nDCG@10


@dataclass(frozen=True, slots=True)
class Choices:
    """What a person decides."""

    name: str
    base: str
    teacher: str
    generator: str | None  # None: no synthetic queries
    budget: str  # a name in BUDGETS
    language: str | None = None  # ISO 639-3; None: found by the texts


def starter_config(found: Sequence[Inspected], choices: Choices) -> str:
    """The config as YAML with comments; it is a valid one.

    Raises:
        DataError: too few rows for a run.
        ConfigError: choices that do not fit each other.
    """
    rows = sum(one.rows for one in found)
    if rows < FEWEST_ROWS:
        raise DataError(
            f"{rows} rows are too few to train on and hold some out; allowed: {FEWEST_ROWS} or more"
        )
    budget = BUDGETS[choices.budget]
    used = sum(min(one.rows, budget.limit or one.rows) for one in found)
    parts = [
        _head(found, choices),
        _corpus(found, choices, budget, used),
        *([_synthesis(choices.generator, budget, found, choices)] if choices.generator is not None else []),
        _mining(choices, budget, used),
        _encoder(choices, budget),
        _training(choices, budget, used),
        _judging(),
    ]
    text = "\n".join(parts)
    validate(RunConfig, yaml.safe_load(text), "init")
    return text


def language(one: Inspected, choices: Choices) -> str | None:
    """ISO 639-3 code of a source's documents: as stated, else as most of the sample is."""
    return choices.language or language_of(one.texts)


def warnings(found: Sequence[Inspected], choices: Choices) -> list[str]:
    """What a person should know before running it."""
    lines = []
    foreign = sorted({code for one in found if (code := language(one, choices)) not in (None, "eng")})
    for code in foreign:
        reading = [name for name in dict.fromkeys((choices.base, choices.teacher)) if name in _READS_ENGLISH]
        if reading:
            lines.append(
                f"documents are in {code!r}, and {' and '.join(reading)} learnt English: for results that count choose "
                f"multilingual models by --base and --teacher, such as {_MULTILINGUAL} (pip install 'embedloom[models]')"
            )
    if choices.generator in _SMALL_GENERATORS:
        lines.append(
            f"{choices.generator} is small enough for a laptop and writes poor queries; a generator of 7 billion weights or "
            "more needs a GPU (--generator)"
        )
    return lines


def _head(found: Sequence[Inspected], choices: Choices) -> str:
    seen = "; ".join(_summary(one) for one in found)
    return f"""\
# Written by `embedloom init` after a look at the data: {seen}.
# What a key means: `embedloom config show KEY`. What this run does, how long and for how much: `embedloom plan FILE`.
# Completion in an editor: `embedloom config schema > run.json`, and as first line "# yaml-language-server: $schema=run.json".
run:
  name: {_scalar(choices.name)}  # artefacts and report lie in runs/{choices.name}
  seed: 42
"""


def _summary(one: Inspected) -> str:
    rows = f"{'about ' if one.estimated else ''}{one.rows:,} {'pairs' if one.holds_pairs else 'documents'}"
    mean = sum(one.characters) / len(one.characters)
    return f"{rows} ({one.section['format']}), {mean:,.0f} characters on average"


def _corpus(found: Sequence[Inspected], choices: Choices, budget: Budget, used: int) -> str:
    lines = ["corpus:", "  sources:"]
    for one in found:
        section: dict[str, Any] = dict(one.section)
        if code := language(one, choices):
            section["lang"] = code
        if budget.limit is not None and one.rows > budget.limit:
            section["limit"] = budget.limit
        lines += [
            f"    {'-' if number == 0 else ' '} {line}" for number, line in enumerate(_source_lines(section))
        ]
    shortest = min(one.within(0.05) for one in found)
    if shortest < _USUAL_LEAST:
        least = max(1, min(shortest, 20))
        lines.append(
            f"  min_characters: {least}  # the default of {_USUAL_LEAST} would drop many of these texts"
        )
    long = max(one.within(0.95) for one in found) > budget.tokens * _CHARACTERS_PER_TOKEN
    if long:
        lines.append(
            f"  chunk_tokens: {budget.tokens}  # longer documents are cut into chunks that the encoder reads whole"
        )
    else:
        lines.append("  chunk_tokens: null  # documents are short enough to stay whole")
    share = min(0.3, max(0.1, round(_HELD_OUT_ROWS / used, 2))) if used > FEWEST_ROWS else 0.3
    lines.append(
        f"  split: {{dev: 0, test: {share:g}}}  # held out before anything is trained; scores are measured on it"
    )
    return "\n".join(lines) + "\n"


def _source_lines(section: Mapping[str, Any]) -> list[str]:
    notes = {
        "query_column": "each row is a pair: the text answers this query",
        "query_from": "no queries were found: the {} of a document asks, the rest answers",
        "limit": "of the budget; null: all",
    }
    lines = []
    for key, value in section.items():
        note = notes.get(key, "").format(str(value).replace("_", " "))
        lines.append(f"{key}: {_scalar(value)}" + (f"  # {note}" if note else ""))
    return lines


def _synthesis(generator: str, budget: Budget, found: Sequence[Inspected], choices: Choices) -> str:
    small = generator in _SMALL_GENERATORS
    codes = list(dict.fromkeys(language(one, choices) or "eng" for one in found))
    languages = ", ".join(f"{code}: 1" for code in codes)
    limits = ", max_document_characters: 400, max_new_tokens: 64" if small else ""
    acceptance = "0.6" if small else "0.9"
    return f"""\
synthesis:  # an LLM writes queries for your documents, beside those of the data
  generators:
    - {{model: {_scalar(generator)}, weight: 1, small: {str(small).lower()}}}
  families:
    - {{family: seed_queries, rows: {budget.written}{limits}}}  # rows: queries that are kept
  languages: {{{languages}}}
  expected_acceptance: {acceptance}
  max_attempts_per_row: 16
"""


def _mining(choices: Choices, budget: Budget, used: int) -> str:
    return f"""\
mining:  # a teacher finds documents that are like the answer and are none: hard negatives
  teachers: [{_scalar(choices.teacher)}]  # a better one gives better negatives
  top_k: {max(8, min(50, used // 4))}
  selection: {{method: perc_pos, margin_ratio: 0.95, negatives: 4}}
  max_query_tokens: 64
  max_document_tokens: {budget.tokens}
"""


def _encoder(choices: Choices, budget: Budget) -> str:
    template = _ENCODERS.get(choices.base, "")
    return f"""\
encoder:
  base: {_scalar(choices.base)}  # what is trained: a model folder, a Hugging Face id or a registry name{template}
  max_query_tokens: 64
  max_document_tokens: {budget.tokens}
"""


def _training(choices: Choices, budget: Budget, used: int) -> str:
    written = budget.written if choices.generator is not None else 0
    share = round(min(0.5, written / (used + written)), 2)
    mix = f"{{public: {1 - share:g}, synthetic: {share:g}}}" if share else "{public: 1}"
    wanted = math.ceil(_EPOCHS * (used + written) / budget.batch)
    steps = max(_FEWEST_STEPS, min(budget.most_steps, wanted))
    # Held-out rows and pairs without negatives drop out: passes count what is left, and many of few would be learnt by heart.
    length = f"epochs: {_EPOCHS}" if _FEWEST_STEPS <= wanted <= budget.most_steps else f"max_steps: {steps}"
    rate, temperature = _RATES.get(
        choices.base, ("6.0e-5" if choices.base in _ENCODERS else "5.0e-5", "0.05")
    )
    return f"""\
training:
  loss: qwen3  # compares with the other documents of the batch too; infonce: with the negatives alone
  temperature: {temperature}
  mix: {mix}  # public: the data's own queries
  zero_stage: 1
  freeze_token_embeddings: true
  micro_batch_tokens: 8192
  stages:
    - {{name: finetune, negatives: 2, global_batch: {budget.batch}, learning_rate: {rate}, {length}, warmup_steps: {max(1, steps // 20)}}}
  runs: [{{name: tuned, seed: 1}}]  # several runs are merged into one model
"""


def _judging() -> str:
    return """\
evaluation:
  tasks: [{name: heldout, kind: heldout, split: test}]
  baselines: [bm25, teacher]

gate:  # the trained model must beat the base, or `embedloom serve` refuses it
  candidate: merged
  against: base

serving: {port: 8000}
"""


def run_name(path: str) -> str:
    """A name for the run, from the path of the data."""
    stem = path.rstrip("/").rsplit("/", 1)[-1].split(".")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._-") or "own"


def _scalar(value: Any) -> str:
    """A value on one line of YAML; JSON is YAML, and quotes what is no plain word."""
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", value)
    ordinary = plain and isinstance(yaml.safe_load(value), str)
    return str(value) if ordinary else json.dumps(value, ensure_ascii=False)
