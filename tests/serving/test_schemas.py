import json

import pytest

from embedloom.serving.refusals import ApiError
from embedloom.serving.refusals import parse as parse_body
from embedloom.serving.schemas import EmbeddingsRequest


def parse(**body):
    return parse_body(EmbeddingsRequest, json.dumps({"model": "m", **body}).encode())


def refusal(body: bytes | dict) -> ApiError:
    data = body if isinstance(body, bytes) else json.dumps({"model": "m", **body}).encode()
    with pytest.raises(ApiError) as caught:
        parse_body(EmbeddingsRequest, data)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("given", "as_list", "ids"),
    [
        ("a", ["a"], False),
        (["a", "b"], ["a", "b"], False),
        ([5, 6], [[5, 6]], True),
        ([5, 6.0], [[5, 6]], True),
        ([5.0, 6], [[5, 6]], True),
        ([[5], [6, 7]], [[5], [6, 7]], True),
    ],
)
def test_all_four_input_forms_become_one_list(given, as_list, ids):
    request = parse(input=given)
    assert request.input == as_list
    assert request.is_token_ids is ids


def test_defaults_are_openais_plus_document():
    request = parse(input="a", user="u")
    assert (request.encoding_format, request.input_type, request.truncate) == ("float", "document", "none")
    assert request.dimensions is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "input[0] is an empty"),
        ([], "empty list"),
        (["a", ""], "input[1] is an empty"),
        (["a", 1], "input[1] is of type integer"),
        ([1, "a"], "input[1] is 'a'"),
        ([True], "input[0] is of type boolean"),
        ([1, -2], "input[1] is -2"),
        ([1, 2.5], "input[1] is 2.5"),
        ([[1], []], "input[1] is not a non-empty list"),
        ([[1], ["x"]], "input[1][0] is 'x'"),
        ([[1], 2], "input[1] is not a non-empty list"),
        ({"text": "a"}, "type object"),
        (None, "type null"),
        (3, "type integer"),
        ([["a"]], "input[0][0] is 'a'"),
    ],
)
def test_bad_input_is_refused_by_item(given, words):
    error = refusal({"input": given})
    assert words in str(error)
    assert error.param == "input"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "required"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float', 'base64', 'int8'"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "dimensions": "8"}, "dimensions", "valid integer"),
        ({"input": "a", "dimensions": float("nan")}, "dimensions", "integer"),
        ({"input": "a", "input_type": "passage"}, "input_type", "'query' or 'document'"),
        ({"input": "a", "input_typ": "query"}, "input_typ", "nearest valid one is 'input_type'"),
        ({"input": "a", "task": "searching"}, "task", "allowed: retrieval"),
        ({"input": "a", "truncate": 1}, "truncate", "'none', 'start' or 'end'"),
        ({"input": "a", "truncate": "End"}, "truncate", "'none', 'start' or 'end'"),
        ({"input": "a", "normalized": False}, "normalized", "True"),
        ({"input": "a", "late_chunking": True}, "late_chunking", "False"),
        ({"input": "a", "output_dtype": "int4"}, "output_dtype", "'int8', 'uint8', 'binary'"),
        ({"input": [1, 2], "instruction": "Find"}, "instruction", "token ids"),
        ({"input": [1, 2], "task": "sts"}, "task", "token ids"),
        ({"input": "a", "model": 5}, "model", "valid string"),
        ({"input": "a", "user": 5}, "user", "valid string"),
    ],
)
def test_other_fields_are_refused_by_name(body, param, words):
    error = refusal(body)
    assert error.param == param
    assert words in str(error)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'"text"',
        b"[1]",
        b'{"model": "m", "input": "\xff\xfe"}',
        b"[" * 5000,
    ],
)
def test_broken_bodies_are_refused(body):
    assert str(refusal(body)).startswith("the body")


def test_long_values_do_not_come_back_whole():
    error = refusal({"input": "a", "encoding_format": "x" * 10_000})
    assert len(str(error)) < 300


def test_error_body_has_openais_shape():
    body = refusal({"input": ""}).body()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error"
