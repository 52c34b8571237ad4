"""The real vLLM on a tiny random Llama, in an actor as the stage uses it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from embedloom.compute.generation import GenerationRequest
from embedloom.compute.vllm_engine import VLLMEngine
from embedloom.config.synthesis import EngineOptions
from embedloom.errors import DataError
from fakes_engines import make_tiny_generator

PATTERN = r"^(How|Why) [a-z]{4,12}\?$"
SCHEMA = {
    "type": "object",
    "properties": {"query": {"type": "string", "pattern": PATTERN}},
    "required": ["query"],
    "additionalProperties": False,
}
MAX_MODEL_TOKENS = 256


def request(number: int, words: int = 5, seed: int | None = None) -> GenerationRequest:
    messages = ({"role": "user", "content": f"{number}: " + "word " * words},)
    return GenerationRequest(
        f"id-{number}", messages, number if seed is None else seed, 64, 1.0, 0.95, SCHEMA
    )


@pytest.fixture(scope="module")
def generate(ray_local: None, tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("vllm")
    import ray

    folder: Path = make_tiny_generator(tmp_path_factory.mktemp("generator"))
    # vLLM sets process-wide state, so it never runs in the test's own process.
    actor = ray.remote(num_cpus=1, max_concurrency=4)(VLLMEngine).remote(
        model_folder=folder, options=EngineOptions(max_model_tokens=MAX_MODEL_TOKENS), threads=1, gpu=False
    )
    yield lambda *batches: ray.get([actor.generate.remote(batch) for batch in batches])
    ray.kill(actor)


@pytest.mark.ray
@pytest.mark.slow
def test_schema_seeds_order_and_lengths(generate):
    # 40 requests: more than are decoded together, so the order of completion is not the order of the requests.
    requests = [request(n, words=n % 30) for n in range(40)]
    (first,) = generate(requests)
    assert [result.id for result in first] == [one.id for one in requests]
    assert all(result.finish_reason == "stop" and result.error is None for result in first)
    for one, result in zip(requests, first, strict=True):
        answer = json.loads(result.text)
        assert set(answer) == {"query"}
        assert re.match(PATTERN, answer["query"])
        # One byte is one token here: the template's "<s>user\n" … "</s>\n<s>assistant\n" around the content.
        assert result.prompt_tokens == len(one.messages[0]["content"]) + 19
        assert result.output_tokens == len(result.text) + 1  # and the end of the text

    assert generate(requests) == [first], "the same requests must give the same texts"
    (other_seeds,) = generate([request(n, words=n % 30, seed=n + 1000) for n in range(40)])
    assert sum(a.text == b.text for a, b in zip(first, other_seeds, strict=True)) < 5


@pytest.mark.ray
@pytest.mark.slow
def test_a_long_prompt_is_refused_alone(generate):
    requests = [request(1), request(2, words=40), request(3)]
    ((first, second, third),) = generate(requests)
    assert (first.error, third.error) == (None, None)
    # "2: " + 40 x "word " + 19 = 222 tokens; 256 - 64 = 192 are free.
    assert second.error == "prompt has 222 tokens, 192 fit beside 64 new ones"
    assert (second.id, second.text, second.output_tokens) == ("id-2", "", 0)


@pytest.mark.ray
@pytest.mark.slow
def test_a_schema_the_engine_cannot_compile_is_bad_input(generate):
    schema = {"type": "object", "properties": {"query": {"type": "string", "pattern": "a+", "maxLength": 3}}}
    with pytest.raises(DataError, match="vLLM refuses these requests: The provided JSON schema"):
        generate([replace(request(1), json_schema=schema)])


@pytest.mark.ray
@pytest.mark.slow
def test_several_batches_at_once_keep_their_order_and_one_bad_batch_fails_alone(generate):
    batches = [[request(100 * n + m, words=m % 7) for m in range(12)] for n in range(3)]
    schema = {"type": "object", "properties": {"query": {"type": "string", "pattern": "a+", "maxLength": 3}}}
    found = generate(*batches)
    assert [[one.id for one in results] for results in found] == [
        [one.id for one in batch] for batch in batches
    ]
    assert all(re.match(PATTERN, json.loads(one.text)["query"]) for results in found for one in results)
    with pytest.raises(DataError, match="vLLM refuses these requests"):
        generate(batches[0], [replace(request(1), json_schema=schema)])
    assert len(generate(batches[0])[0]) == 12, "the engine goes on after a refused batch"
