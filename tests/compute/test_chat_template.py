"""Chat templates with and without a system role, rendered by transformers as they are published."""

import pytest

from embedloom.compute.chat_template import ChatTemplate, folded
from embedloom.errors import DataError
from fakes import byte_tokenizer

# google/gemma-2-2b-it, tokenizer_config.json
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Leaves out what it does not know, as some fine-tuned models do.
SILENT = "{% for m in messages if m['role'] in ('user', 'assistant') %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
THINKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")

CHAT = ({"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": "Où est le café ?"})
SHOTS = (
    *CHAT,
    {"role": "assistant", "content": "{}"},
    {"role": "user", "content": "再来一次"},
)


def rendered(template: str, messages) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokens, _ = ChatTemplate(tokenizer, {}, "a model").encode(messages)
    return tokenizer.decode(tokens)


def test_gemmas_template_is_told_in_the_users_turn():
    assert rendered(GEMMA_2, CHAT) == (
        "<s><start_of_turn>user\nAnswer in JSON.\n\nOù est le café ?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert rendered(GEMMA_2, SHOTS).count("<start_of_turn>user") == 2


def test_a_template_that_leaves_the_system_message_out_is_told_in_the_users_turn():
    assert rendered(SILENT, CHAT) == "[user] Answer in JSON.\n\nOù est le café ?\n"


def test_a_template_with_a_system_role_gets_it():
    assert rendered(CHATML, CHAT) == (
        "<|im_start|>system\nAnswer in JSON.<|im_end|>\n<|im_start|>user\nOù est le café ?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_prompt_that_opens_the_thinking_is_told_apart():
    tokenizer = byte_tokenizer()
    for template, opened in ((THINKING, True), (CHATML, False)):
        tokenizer.chat_template = template
        assert ChatTemplate(tokenizer, {}, "a model").encode(CHAT)[1] is opened


def test_templates_that_cannot_be_used_are_refused_by_the_models_name():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"^models/x: its tokenizer has no chat template"):
        ChatTemplate(tokenizer, {}, "models/x")
    tokenizer.chat_template = "{{ raise_exception('only for translation') }}"
    with pytest.raises(DataError, match=r"^models/x: its chat template takes no user's message: only for tr"):
        ChatTemplate(tokenizer, {}, "models/x")


def test_nothing_is_lost_in_folding():
    before = [dict(one) for one in SHOTS]
    found = folded(SHOTS)
    assert [one["role"] for one in found] == ["user", "assistant", "user"]
    assert found[1:] == before[2:] and list(SHOTS) == before, "the messages given stay as they are"
    assert folded(CHAT[:1]) == [{"role": "user", "content": "Answer in JSON."}]
    assert folded(CHAT[1:]) == [CHAT[1]]
    assert folded((CHAT[0], SHOTS[2])) == [{"role": "user", "content": "Answer in JSON."}, SHOTS[2]]
