"""``embedloom init``: a first run config for somebody's own documents."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedloom.errors import ConfigError

if TYPE_CHECKING:
    from embedloom.corpus.inspection import Inspected


class Budget(StrEnum):
    """How much work the run is."""

    small = "small"
    medium = "medium"


_TEACHER = _BASE = "minilm-l6"
_GENERATOR = "smollm2-135m"

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="FOLDER|FILE...",
        help="Your texts: .txt, .md, .jsonl[.gz], .parquet, .csv, .tsv, or a BEIR folder.",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the config goes.")]
Base = Annotated[
    str | None, typer.Option("--base", help="Model to train: a folder, a Hugging Face id or a registry name.")
]
Teacher = Annotated[str, typer.Option("--teacher", help="Model that finds hard negatives.")]
Synthetic = Annotated[
    bool | None, typer.Option("--synthetic/--no-synthetic", help="Whether an LLM writes further queries.")
]
Generator = Annotated[str, typer.Option("--generator", help="With --synthetic: the LLM that writes.")]
BudgetOption = Annotated[
    Budget | None,
    typer.Option("--budget", help="small: minutes on a laptop, to see it work; medium: hours, or a GPU."),
]
Text = Annotated[
    str | None, typer.Option("--text-column", help="Column of the texts; default: found by name.")
]
Query = Annotated[str | None, typer.Option("--query-column", help="Column of queries that the texts answer.")]
Title = Annotated[str | None, typer.Option("--title-column", help="Column of titles.")]
Id = Annotated[str | None, typer.Option("--id-column", help="Column of unique ids.")]
Language = Annotated[
    str | None, typer.Option("--lang", help="Language of the texts, ISO 639-3; default: detected.")
]
Name = Annotated[str | None, typer.Option("--name", help="Name of the run; default: that of the data.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; take the defaults.")]


def init(
    sources: Sources,
    output: Output = Path("run.yaml"),
    base: Base = None,
    teacher: Teacher = _TEACHER,
    synthetic: Synthetic = None,
    generator: Generator = _GENERATOR,
    budget: BudgetOption = None,
    text_column: Text = None,
    query_column: Query = None,
    title_column: Title = None,
    id_column: Id = None,
    lang: Language = None,
    name: Name = None,
    force: Force = False,
    yes: Yes = False,
) -> None:
    """Write a short, commented run config for your own documents; asks what is not given."""
    from embedloom.core.storage import Place
    from embedloom.corpus.inspection import Columns, inspect
    from embedloom.pipeline.starter import Choices, run_name, starter_config, warnings

    if output.exists() and not force:
        raise ConfigError(f"--output: {output} exists; allowed: another file, or --force to overwrite it")
    columns = Columns(text_column, query_column, title_column, id_column)
    looked = [inspect(source, columns) for source in sources]
    found = [one for own, _ in looked for one in own]
    for one in found:
        print(_told(one))
    for ending, count in sorted((item for _, unread in looked for item in unread.items())):
        print(f"not read: {count:,} {ending} files; convert them to text first")
    ask = on_terminal() and not yes
    written = not any(one.holds_pairs for one in found)
    choices = Choices(
        name or run_name(sources[0]),
        base or _answer(ask, "Base model (folder, Hugging Face id, minilm-l6, smollm2-135m)", _BASE),
        teacher,
        generator if _decided(ask, synthetic, "Shall an LLM write further queries", written) else None,
        (budget or Budget(_answer(ask, "Budget", Budget.small.value, [one.value for one in Budget]))).value,
        lang,
    )
    text = starter_config(found, choices)
    Place(str(output.absolute().parent)).write_bytes(output.name, text.encode())
    for line in warnings(found, choices):
        print(f"note: {line}")
    print(f"next: embedloom plan {output}   what it does, how long and for how much")
    print(f"      embedloom run {output}    then the report, and: embedloom serve {output}")
    print(output)


def on_terminal() -> bool:
    """Whether somebody is there to be asked."""
    return sys.stdin.isatty()


def _told(one: "Inspected") -> str:
    section = one.section
    columns = ", ".join(
        f"{key.removesuffix('_column')} {section[key]!r}" for key in section if key.endswith("_column")
    )
    kind = "pairs" if one.holds_pairs else "documents"
    middle, long = one.within(0.5), one.within(0.95)
    return (
        f"{section['path']}: {'about ' if one.estimated else ''}{one.rows:,} {kind} ({section['format']}"
        f"{'; columns: ' + columns if columns else ''}), half of them within {middle:,} characters, 95 % within {long:,}"
    )


def _answer(ask: bool, question: str, default: str, allowed: list[str] | None = None) -> str:
    if not ask:
        return default
    from rich.prompt import Prompt

    return str(Prompt.ask(question, choices=allowed, default=default))


def _decided(ask: bool, given: bool | None, question: str, default: bool) -> bool:
    if given is not None or not ask:
        return default if given is None else given
    from rich.prompt import Confirm

    return bool(Confirm.ask(question, default=default))
