"""The OpenAPI document: what it states, and that the endpoint keeps to it under schemathesis' requests."""

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

from fakes_serving import FakeEncoder, api_of, client_of

# What no schema can say: lengths in tokens, the vocabulary, the dimensions and instructions of the model.
BEYOND_SCHEMA = {
    "context_length_exceeded", "dimensions_not_available", "invalid_token_id", "request_too_large", "contract_hash_twice",
    "prompt_for_token_ids",
}  # fmt: skip

schema = schemathesis.openapi.from_asgi(
    "/openapi.json", api_of(FakeEncoder(limit=128), max_item_characters=400)
)
schema.config.generation.update(modes=list(schemathesis.GenerationMode))


@schema.parametrize()
@settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
def test_endpoint_keeps_to_its_document(case):
    checks = [
        not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
        response_schema_conformance, negative_data_rejection, unsupported_method,
    ]  # fmt: skip
    response = case.call()
    code = None
    if response.status_code == 400:
        code = response.json()["error"]["code"]
    if code not in BEYOND_SCHEMA:
        checks.append(positive_data_acceptance)
    case.validate_response(response, checks=checks)


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
