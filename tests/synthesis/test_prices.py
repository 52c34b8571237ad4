import pytest

from embedloom.config.cluster import PoolConfig
from embedloom.config.synthesis import SynthesisConfig
from embedloom.synthesis.prices import describe, prices

SECTION = {
    "generators": [
        {"model": "openai/gpt-oss-20b", "weight": 1},
        {"model": "meta-llama/Llama-3.3-70B-Instruct", "weight": 1},
        {"model": "house/own", "weight": 2},
    ],
    "families": [
        {"family": "seed_queries", "rows": 12_000, "queries_per_document": 3, "max_new_tokens": 100},
        {"family": "classification", "rows": 4_000, "tasks_per_answer": 20},
        {"family": "existing_questions", "rows": 9_999},
    ],
    "sampling": {"max_new_tokens": 500},
    "tasks": {"count": 400},
}


def test_answers_and_tokens_by_hand():
    found = {price.model: price for price in prices(SynthesisConfig.model_validate(SECTION), gpu=True)}
    small, large, own = found.values()
    # A quarter each of 4,000 documents, 4,000 texts and 20 task lists; existing questions ask nobody.
    assert (small.answers, small.output_tokens) == (1_000 + 1_000 + 5, 1_000 * 100 + 1_000 * 500 + 5 * 500)
    assert (large.answers, large.output_tokens) == (small.answers, small.output_tokens)
    assert (own.answers, own.output_tokens) == (2 * small.answers, 2 * small.output_tokens)
    assert small.hours == pytest.approx(602_500 / 2_400 / 3_600)
    assert large.hours == pytest.approx(602_500 / 600 / 3_600)
    assert own.hours is None


def test_the_plan_says_what_runs_together_and_what_is_not_priced():
    section = SynthesisConfig.model_validate(SECTION)
    text = "\n".join(describe(section, PoolConfig(min_actors=1, max_actors=4, cpus=2, gpus=1)))
    assert "side by side: openai/gpt-oss-20b (1 x 1 GPU), meta-llama" in text
    assert "house/own: 4,010 answers, 1,205,000 output tokens at most, no rate known, not priced" in text
    assert "together 2,410,000 output tokens, 0.3 GPU-hours at most for 2 of 3 generators" in text
    assert "github.com/ray-project/ray/issues/52634" in text
    alone = describe(section, PoolConfig(cpus=1))
    assert alone[0].startswith("synthesis: turn 1 of 3, alone: openai/gpt-oss-20b (1 x 1 CPU)")


def test_more_is_asked_for_where_rejects_are_expected():
    section = SynthesisConfig.model_validate({**SECTION, "expected_acceptance": 0.5})
    assert prices(section, gpu=True)[0].answers == 2_000 + 2_000 + 5
