"""The OpenAPI document: what it states, and that the endpoint keeps to it under schemathesis' requests."""

import hashlib
import os
import tempfile
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from embedloom.config.serving import BatchesConfig
from embedloom.serving.batches.routes import BatchDesk
from embedloom.serving.front import ApiKey
from embedloom.serving.schemas import CorpusCard, SearchHit
from fakes_serving import FakeEncoder, api_of, client_of

# What no schema can say: lengths in tokens, the vocabulary, the dimensions and instructions of the model.
BEYOND_SCHEMA = {
    "context_length_exceeded", "dimensions_not_available", "invalid_token_id", "request_too_large", "contract_hash_twice",
    "prompt_for_token_ids", "empty_file", "rerank_not_available",
}  # fmt: skip

# `python tests/drills/serve_schema.py` asks many more times, each time others.
EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "60"))
KEY = "sk-of-these-tests"
HEADERS = {"authorization": f"Bearer {KEY}"}
calls = 0


class OneDocument:
    """A corpus that always finds the same."""

    card = CorpusCard(documents=1, dimension=8, index="exact", texts=True)
    contract_hash = FakeEncoder(limit=128).contract.hash

    def search(self, query, count, with_texts, words=None):
        return [SearchHit(id="d", score=0.5, title=None, text="found" if with_texts else None)]


def schema_of(**settings):
    api = api_of(FakeEncoder(limit=128), max_item_characters=400, **settings)
    schema = schemathesis.openapi.from_asgi("/openapi.json", api, headers=HEADERS)
    schema.config.generation.update(modes=list(schemathesis.GenerationMode))
    return schema


plain = schema_of()
keyed = schema_of(keys=(ApiKey(name="tests", sha256=hashlib.sha256(KEY.encode()).hexdigest()),))
searching = schema_of(corpus=OneDocument())
batches = tempfile.TemporaryDirectory()
batching = schema_of(desk=BatchDesk(BatchesConfig(folder=batches.name), {}, lambda: None))


def asked(examples: int):
    return settings(
        max_examples=max(1, examples),
        deadline=None,
        derandomize="SCHEMA_EXAMPLES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def keeps_to_the_document(case, **options) -> None:
    global calls
    calls += 1
    checks = [
        not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
        response_schema_conformance, negative_data_rejection, unsupported_method,
    ]  # fmt: skip
    response = case.call(**options)
    code = None
    if response.status_code == 400:
        code = response.json()["error"]["code"]
    if code not in BEYOND_SCHEMA:
        checks.append(positive_data_acceptance)
    case.validate_response(response, checks=checks)


@plain.parametrize()
@asked(EXAMPLES)
def test_endpoint_keeps_to_its_document(case):
    keeps_to_the_document(case)


@keyed.parametrize()
@asked(EXAMPLES // 20)
def test_endpoint_with_keys_keeps_to_its_document(case):
    keeps_to_the_document(case, headers=HEADERS)


@searching.include(path="/v1/search").parametrize()
@asked(EXAMPLES // 3)
def test_search_keeps_to_the_document(case):
    keeps_to_the_document(case)


@batching.include(path_regex="/v1/(files|batches)").parametrize()
@asked(EXAMPLES // 3)
def test_batches_keep_to_the_document(case):
    keeps_to_the_document(case)


@pytest.fixture(scope="module", autouse=True)
def counted():
    """Tell the drill how many calls there were."""
    yield
    if "SCHEMA_CALLS_FILE" in os.environ:
        Path(os.environ["SCHEMA_CALLS_FILE"]).write_text(str(calls))


def test_document_states_this_endpoints_limits():
    with client_of(FakeEncoder(), max_items=5, max_item_characters=99) as client:
        document = client.get("/openapi.json").json()
        assert client.get("/docs").status_code == client.get("/redoc").status_code == 404
    request = document["components"]["schemas"]["EmbeddingsRequest"]
    text, texts, ids, lists = request["properties"]["input"]["oneOf"]
    assert (text["maxLength"], texts["maxItems"], texts["items"]["maxLength"]) == (99, 5, 99)
    assert "maxItems" not in ids and lists["maxItems"] == 5  # a list of token ids is one item
    assert request["properties"]["model"]["enum"] == ["tiny"]
    assert request["additionalProperties"] is False
    assert "/v1/search" not in document["paths"]
    errors = document["paths"]["/v1/embeddings"]["post"]["responses"]
    assert {"400", "409", "413", "415", "429"} <= set(errors)
    assert "retry-after" in errors["429"]["headers"]
