"""Writes the generated parts of the reference pages, from the code that they describe.

    python docs/generate.py

A generated part stands between two comments, ``<!-- generated: NAME -->`` and ``<!-- end of NAME -->``; what is outside
them is written by hand. ``tests/test_docs.py`` fails while a part is out of date.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer
from starlette.testclient import TestClient
from typer.cli import get_docs_for_click

from embedloom import errors
from embedloom.cli import app
from embedloom.config.serving import SEARCH_MODES, BatchesConfig
from embedloom.core.prompting import PromptContract
from embedloom.core.schemas import SCHEMAS
from embedloom.serving.api import create_api
from embedloom.serving.batches.routes import BatchDesk
from embedloom.serving.calls import EndpointSettings
from embedloom.serving.metrics import EndpointMetrics

PAGES = Path(__file__).parent / "reference"
_PART = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(?=<!-- end of (?P=name) -->)", re.DOTALL)
_SAMPLES = {"counter": "_total", "gauge": "", "histogram": "_bucket, _sum, _count"}
_FOREIGN = "x-of-another-dialect"  # marks request fields that only clients of other products send


def cli() -> str:
    """Every command with its arguments and options, from the typer application."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="embedloom")
    text = get_docs_for_click(obj=command, ctx=context, name="embedloom", indent=1)
    # Typer shortens each help text in the lists of commands to 45 characters; the sections below have them whole.
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text)
    # Its usage lines put required arguments into braces and optional ones into two pairs of brackets.
    usage = re.compile(r"```console\n\$ (.*)\n")
    plain = usage.sub(lambda found: f"```text\n{found[1].replace('[[', '[').replace(']]', ']')}\n", text)
    return _single_ticks(re.sub(r"\{([A-Z|]+)\}|\{([A-Z|]+\.\.\.)\}\.\.\.", r"\1\2", plain))


def exit_codes() -> str:
    """The exception tree with the exit code of each class."""
    rows = []

    def walk(kind: type[errors.EmbedloomError], depth: int) -> None:
        name = "&nbsp;" * 4 * depth + f"`{kind.__name__}`"
        rows.append([name, str(kind.exit_code), (kind.__doc__ or "").splitlines()[0]])
        own = [one for one in vars(errors).values() if isinstance(one, type)]
        for child in [one for one in own if one.__base__ is kind]:
            walk(child, depth + 1)

    walk(errors.EmbedloomError, 0)
    return _table(["class", "exit code", "meaning"], rows)


def metrics() -> str:
    """Names, types and labels of the endpoint's Prometheus metrics."""
    found = EndpointMetrics()
    found.watch_queue(lambda: {"query": 0, "bulk": 0})
    own = {metric._name: metric._labelnames for metric in found.registry._collector_to_names}
    rows = [
        [
            f"`{family.name}`",
            family.type,
            _SAMPLES[family.type] or "(none)",
            ", ".join(own[family.name]),
            family.documentation,
        ]
        for family in found.registry.collect()
    ]
    return _table(["name", "type", "suffixes of its samples", "labels", "meaning"], sorted(rows))


def tables() -> str:
    """Columns of the Parquet tables that pass between stages."""
    parts = []
    for kind, schema in SCHEMAS.items():
        rows = [
            [f"`{name}`", f"`{dtype}`", "no" if name in schema.optional else "yes"]
            for name, dtype in schema.columns.items()
        ]
        parts.append(f"### {kind}\n\n{_table(['column', 'type', 'required'], rows)}")
    return "\n".join(parts)


def contract() -> str:
    """Fields of ``contract.json`` with the values of a model that embedloom makes, then those of a named task."""
    schema = PromptContract.model_json_schema()
    default = PromptContract()
    rows = [
        [
            f"`{name}`",
            _type(form),
            "by task type" if name == "instructions" else _literal(getattr(default, name)),
        ]
        for name, form in schema["properties"].items()
    ]
    (named,) = schema["$defs"].values()
    fields = [
        [f"`{name}`", _type(form), "required" if name in named["required"] else _literal(form.get("default"))]
        for name, form in named["properties"].items()
    ]
    head = ["field", "type", "default"]
    return f"{_table(head, rows)}\n#### {named['title']}\n\n{named['description']}\n\n{_table(head, fields)}"


def _document() -> dict[str, Any]:
    """The endpoint's own OpenAPI document, of a model called MODEL with a corpus."""
    settings = EndpointSettings(
        served_name="MODEL",
        fingerprint="0" * 16,
        created=0,
        max_items=2048,
        max_requests=1,
        request_timeout_seconds=1.0,
    )
    desk = BatchDesk(BatchesConfig(folder="batches"), {}, lambda: None)
    corpus = SimpleNamespace(contract_hash="", card=SimpleNamespace(modes=SEARCH_MODES))
    api = create_api(None, settings, corpus=corpus, desk=desk)  # type: ignore[arg-type]
    document: dict[str, Any] = TestClient(api).get("/openapi.json").json()
    return document


def routes() -> str:
    """One row an operation; paths with the same bodies and summary share it."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for path, operations in _document()["paths"].items():
        for method, operation in operations.items():
            asked = operation.get("requestBody", {}).get("content", {})
            body = _links(asked.get("application/json", {}).get("schema", {}))
            if "multipart/form-data" in asked:
                body = "`multipart/form-data`: " + _fields(asked["multipart/form-data"]["schema"])
            if queried := [
                f"`{one['name']}`" for one in operation.get("parameters", ()) if one["in"] == "query"
            ]:
                body = f"query: {', '.join(queried)}"
            content = operation["responses"]["200"]["content"]
            reply = content["application/json"]["schema"] if "application/json" in content else None
            what = _links(reply) if reply else f"`{next(iter(content))}`"
            key = (method.upper(), _single_ticks(operation["summary"]), body, what)
            found.setdefault(key, []).append(f"`{path}`")
    rows = [
        [method, ", ".join(paths), text, body, reply] for (method, text, body, reply), paths in found.items()
    ]
    return _table(["method", "path", "what it does", "request body", "reply"], rows)


def _fields(form: dict[str, Any]) -> str:
    """The fields of a form."""
    required = form["required"]
    return ", ".join(f"`{name}`" + ("" if name in required else " (optional)") for name in form["properties"])


def bodies() -> str:
    """Every request and reply type with its fields."""
    parts = []
    for name, schema in sorted(_document()["components"]["schemas"].items()):
        about = _single_ticks(schema.get("description") or "")
        text = f"### {name}\n\n{about}\n\n" if about else f"### {name}\n\n"
        if "properties" not in schema:
            parts.append(f"{text}{_type(schema)}\n")
            continue
        required = schema.get("required", ())
        rows = []
        for field, form in schema["properties"].items():
            default = (
                "required" if field in required else _literal(form["default"]) if "default" in form else ""
            )
            note = " ".join(form.get("description", "").split())
            rows.append([f"`{field}`", _type(form), default, note])
        parts.append(text + _table(["field", "type", "default", "meaning"], rows))
    return "\n".join(parts)


def _type(schema: dict[str, Any]) -> str:
    """A JSON Schema as one short phrase."""
    if "$ref" in schema:
        return _links(schema)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[key]))
    if "const" in schema or "enum" in schema:
        return ", ".join(_literal(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}" if "items" in schema else "list"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    return str(schema.get("type", "any"))


def _links(schema: dict[str, Any]) -> str:
    """Links to the types that a schema refers to."""
    names = [one["$ref"].rsplit("/", 1)[1] for one in schema.get("anyOf", [schema]) if "$ref" in one]
    return " or ".join(f"[{name}](#{name.lower()})" for name in names)


def _single_ticks(text: str) -> str:
    """Docstrings' double backticks as Markdown's single ones; fences of three stay."""
    return re.sub(r"(?<!`)``(?!`)", "`", text)


def _literal(value: Any) -> str:
    shown = {None: "null", True: "true", False: "false"}
    if isinstance(value, bool) or value is None:
        return f"`{shown[value]}`"
    if isinstance(value, list | tuple):
        return ", ".join(f"`{one}`" for one in value) or "`[]`"
    return "`" + str(value).replace("\n", "\\n") + "`"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


PARTS: dict[str, Callable[[], str]] = {
    "cli": cli, "exit-codes": exit_codes, "metrics": metrics, "tables": tables, "contract": contract,
    "routes": routes, "bodies": bodies,
}  # fmt: skip


def current(text: str) -> str:
    """A page with every generated part as the code has it now.

    Raises:
        KeyError: a part that this script does not know.
    """
    return _PART.sub(lambda found: f"{found[1]}\n{PARTS[found['name']]()}\n", text)


def main() -> None:
    """Write all pages that have generated parts."""
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text()
        if (new := current(text)) != text:
            page.write_text(new)
            print(page)


if __name__ == "__main__":
    main()
