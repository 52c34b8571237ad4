import pytest

from embedloom.config.base import FrozenConfig, validate
from embedloom.config.mining import Teacher
from embedloom.errors import ConfigError

URL = "http://localhost:8000/v1"


class Section(FrozenConfig):
    teachers: tuple[Teacher, ...]


def teacher(**content) -> Teacher:
    return validate(Section, {"teachers": [{"model": "m", **content}]}, "run.yaml").teachers[0]


def test_a_string_is_the_model():
    found = validate(Section, {"teachers": ["minilm-l6", {"model": "b", "engine": "encoder"}]}, "run.yaml")
    assert [(one.model, one.engine) for one in found.teachers] == [("minilm-l6", "auto"), ("b", "encoder")]


def test_each_engine_takes_its_own_keys():
    assert teacher(engine="openai", url=URL, api_key_env="KEY", max_characters=8000, concurrency=8).url == URL
    assert teacher(query_template="{instruction}: {text}", max_query_tokens=64).max_query_tokens == 64
    assert teacher(engine="encoder", dtype="float32").dtype == "float32"


def test_a_dumped_section_reads_back():
    for one in (teacher(), teacher(engine="openai", url=URL), teacher(engine="encoder", dtype="float32")):
        assert Teacher.model_validate(one.model_dump()) == one


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"engine": "openai"}, "engine openai needs url"),
        ({"url": URL}, "url does not fit engine auto; only engine openai takes it"),
        ({"engine": "encoder", "max_retries": 2}, "max_retries does not fit engine encoder"),
        (
            {"engine": "openai", "url": URL, "max_query_tokens": 64},
            "max_query_tokens does not fit engine openai",
        ),
        ({"engine": "openai", "url": URL, "dtype": "float32"}, "dtype does not fit engine openai"),
        ({"engine": "encoder", "query_template": "{text}"}, "query_template does not fit engine encoder"),
        ({"query_template": "query: "}, r"query_template: a template holds \{text\} once"),
        ({"document_template": "{title} {text}"}, r"document_template: a template holds \{text\} once"),
        ({"query_template": "{text}{text}"}, r"a template holds \{text\} once"),
        ({"engine": "openai", "url": "localhost:8000"}, r"url must be http\(s\)://"),
        ({"engine": "openai", "url": "https://me:key@host/v1"}, "a key goes into api_key_env"),
        ({"engine": "openai", "url": f"{URL}/embeddings/"}, "without /embeddings"),
        ({"engine": "openai", "url": URL, "api_key_env": "sk-123"}, "api_key_env"),
        ({"engine": "telepathy"}, "engine"),
        ({"batch_size": 0}, "batch_size"),
        ({"moddel": "x"}, "unknown key; the nearest valid key is 'model'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(content, message):
    with pytest.raises(ConfigError, match=rf"run\.yaml: teachers\.0.*{message}") as caught:
        teacher(**content)
    assert "\n" not in str(caught.value)
