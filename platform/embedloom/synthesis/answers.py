"""From an engine's text to JSON of the asked shape, or a reject."""

import json
from typing import Any

import jsonschema

from embedloom.engines.protocol import ENGINE_CUT, GenerationResult
from embedloom.synthesis.families.base import Ask, Reject, reject


def read_json(result: GenerationResult, ask: Ask) -> dict[str, Any] | Reject:
    """The answer, checked against the schema it was asked for.

    An engine that constrains its output is checked too: grammars have bugs, and not every engine has them.
    """
    if result.error is not None:
        return reject("engine_error", result.error)
    try:
        answer = json.loads(result.text)
    except ValueError:
        return reject("truncated" if result.finish_reason == ENGINE_CUT else "invalid_json", result.text)
    try:
        jsonschema.validate(answer, ask.json_schema)
    except jsonschema.ValidationError as error:
        where = ".".join(str(part) for part in error.absolute_path)
        return reject("schema", f"{where or 'answer'}: {error.message}")
    checked: dict[str, Any] = answer
    return checked
