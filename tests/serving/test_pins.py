"""A request that is pinned to a contract hash never gets vectors of another."""

import pytest

from fakes_serving import FakeEncoder, client_of, refused

OTHER = "0" * 16
PATHS = {
    "/v1/embeddings": {"model": "tiny", "input": "ab"},
    "/v1/rerank": {"model": "tiny", "query": "q", "documents": ["ab"], "instruction": "Find"},
    "/v1/similarity": {"model": "tiny", "query": "q", "documents": ["ab"], "instruction": "Find"},
    "/tokenize": {"input": "ab"},
}


@pytest.fixture
def encoder():
    return FakeEncoder()


@pytest.fixture
def client(encoder):
    with client_of(encoder) as client:
        yield client


@pytest.mark.parametrize("path", PATHS)
def test_the_own_hash_is_served_and_another_is_a_conflict(client, encoder, path):
    own = encoder.contract.hash
    assert client.post(path, json={**PATHS[path], "contract_hash": own}).status_code == 200
    assert client.post(path, json=PATHS[path], headers={"X-Contract-Hash": own}).status_code == 200
    for options in ({"json": {**PATHS[path], "contract_hash": OTHER}}, {"json": PATHS[path], "headers": {"X-Contract-Hash": OTHER}}):  # fmt: skip
        error = refused(client.post(path, **options), 409)
        assert (error["param"], error["code"]) == ("contract_hash", "contract_mismatch")
        assert OTHER in error["message"] and own in error["message"]


def test_what_is_no_hash_is_a_bad_request(client, encoder):
    body = PATHS["/v1/embeddings"]
    assert refused(client.post("/v1/embeddings", json={**body, "contract_hash": "x"}), 400)["param"] == "contract_hash"  # fmt: skip
    error = refused(client.post("/v1/embeddings", json=body, headers={"X-Contract-Hash": "x"}), 400)
    assert error["param"] == "x-contract-hash"
    both = client.post(
        "/v1/embeddings",
        json={**body, "contract_hash": encoder.contract.hash},
        headers={"X-Contract-Hash": OTHER},
    )
    assert refused(both, 400)["code"] == "contract_hash_twice"
