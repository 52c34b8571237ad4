"""Code beside the weights: not run, not asked about, and named with its switch; run as it was where a person allowed it."""

import json
import shutil

import numpy as np
import pytest
from transformers import dynamic_module_utils

from embedloom.config.embedding import EmbeddingConfig
from embedloom.config.mining import RescoringConfig, Teacher
from embedloom.config.serving import ApplicationArgs, ServingConfig
from embedloom.core.contents import is_trusted
from embedloom.core.model_folder import ModelFolder
from embedloom.encoder.export import prepare_base
from embedloom.encoder.model import Encoder
from embedloom.encoder.own_code import trusted_copy
from embedloom.encoder.registry import local_contents, local_folder, open_model, resolve_model
from embedloom.errors import DataError
from embedloom.retrieval.teachers import SentenceEncoder, teacher_source
from fakes_bases import make_base
from fakes_foreign import TEXTS, make_transformer, save_library_model, write, write_old_layout
from fakes_own_code import CODE, own_code_model, with_own_module


@pytest.fixture(autouse=True)
def ran(tmp_path, monkeypatch):
    """A file that is there once the model's code has run; caches of this test's own, and no terminal."""
    monkeypatch.setenv("OWN_CODE_RAN", str(tmp_path / "ran"))
    monkeypatch.setenv("EMBEDLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    return tmp_path / "ran"


def library_vectors(folder):
    """Query and document side, by the library with the same permission."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    return [
        encode(TEXTS, normalize_embeddings=True) for encode in (model.encode_query, model.encode_document)
    ]


def test_without_the_switch_the_error_names_it_and_nothing_runs(tmp_path, ran):
    folder = own_code_model(tmp_path / "model")
    words = r"model_type 'own_model' .*run only by trust_remote_code: true of a teacher.*--trust-remote-code of embed, serve"
    for opened in (
        Encoder.load,
        beyond_or_contract,
        lambda path: teacher_source(Teacher(model=str(path))),
    ):
        with pytest.raises(DataError, match=words):
            opened(folder)
    with_own_module(folder)
    assert "module classes of its own (own_module.Flipped)" in open_model(folder).beyond
    with pytest.raises(
        DataError, match=r"sentence-transformers cannot load .* is run only by trust_remote_code"
    ):
        SentenceEncoder(folder)
    assert not ran.exists()


def beyond_or_contract(folder):

    return open_model(folder).contract


def test_with_the_switch_vectors_are_the_library_s(tmp_path, ran):
    folder = own_code_model(tmp_path / "model")
    copy = resolve_model(str(folder), trust_remote_code=True)
    assert is_trusted(copy) and not is_trusted(folder) and copy.name == "model" and not ran.exists()
    expected = library_vectors(folder)
    encoder = Encoder.load(copy, dtype="float32", device="cpu")
    assert ran.exists() and not encoder.packed and encoder.contract.max_query_tokens == 40
    found = [encoder.embed(TEXTS, side) for side in ("query", "document")]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert abs(found[0] - found[1]).max() > 0.01  # the prompt counts
    shared = Encoder.load(copy, weights=encoder.share_weights())
    np.testing.assert_array_equal(shared.embed(TEXTS, "query"), found[0])
    teacher = teacher_source(Teacher(model=str(folder), trust_remote_code=True, dtype="float32")).open()
    vectors, _ = teacher.embed(TEXTS, "query", ["retrieval"] * 4, [None] * 4)
    np.testing.assert_allclose(vectors, expected[0], atol=1e-5)


def test_module_classes_of_its_own_go_through_the_library(tmp_path):
    folder = with_own_module(own_code_model(tmp_path / "model"))
    copy = trusted_copy(folder)
    expected = library_vectors(folder)
    found = [SentenceEncoder(copy, "float32").embed(TEXTS, side) for side in ("query", "document")]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    plain = library_vectors(own_code_model(tmp_path / "plain"))
    np.testing.assert_allclose(np.flip(expected, -1), plain, atol=1e-6)


def test_code_that_changes_later_is_another_model_that_was_not_allowed(tmp_path):
    folder = own_code_model(tmp_path / "model")
    first = trusted_copy(folder)
    before, identity = Encoder.load(first, dtype="float32").embed(TEXTS, "document"), ModelFolder(first).id
    assert trusted_copy(folder) == first
    (folder / "modeling_own.py").write_text(CODE.replace("torch.tanh(", "torch.relu("))
    np.testing.assert_array_equal(Encoder.load(first, dtype="float32").embed(TEXTS, "document"), before)
    second = trusted_copy(folder)
    assert second != first
    assert ModelFolder(second).id != identity == ModelFolder(first).id
    assert ModelFolder(second).revision != ModelFolder(first).revision
    assert abs(Encoder.load(second, dtype="float32").embed(TEXTS, "document") - before).max() > 0.01


def test_the_code_counts_as_content_only_where_it_is_run(tmp_path):
    folder = own_code_model(tmp_path / "model")
    plain, run = local_contents(str(folder)), local_contents(str(folder), code=True)
    assert {name: run[name] for name in plain} == plain and set(run) - set(plain) == {"modeling_own.py"}
    assert ModelFolder(trusted_copy(folder)).id != ModelFolder(folder).id
    for section in (Teacher(model="m"), EmbeddingConfig(), ServingConfig(), RescoringConfig(model="m")):
        on = section.model_copy(update={"trust_remote_code": True})
        assert "trust_remote_code" not in section.model_dump(mode="json")  # so older fingerprints stay
        assert on.model_dump(mode="json")["trust_remote_code"] is True


def test_nothing_in_a_folder_gives_the_permission(tmp_path, ran):
    copy = trusted_copy(own_code_model(tmp_path / "model"))
    elsewhere = shutil.copytree(copy.parent.parent, tmp_path / "trusted") / copy.parent.name / copy.name
    write(elsewhere / "config_sentence_transformers.json", {"trust_remote_code": True, "prompts": {}})
    with pytest.raises(DataError, match="run only by"):
        Encoder.load(elsewhere)
    assert not ran.exists()


def test_models_that_need_no_code_of_their_own_stay_where_they_are(tmp_path, tiny_llama, capsys):
    bert = make_transformer(tmp_path / "bert", limit=300)
    plain = save_library_model(tmp_path / "plain", bert)
    assert trusted_copy(plain) == plain
    assert "trust_remote_code changes nothing" in capsys.readouterr().err
    nemotron = shutil.copytree(tiny_llama, tmp_path / "nemotron")
    config = json.loads((nemotron / "config.json").read_text())
    own = {"model_type": "llama_bidirec", "auto_map": {"AutoModel": "own.Model"}, "pooling": "avg"}
    write(nemotron / "config.json", {**config, **own})
    assert trusted_copy(nemotron) == nemotron  # read as Llama


def test_code_of_another_repository_and_code_that_is_not_there_are_refused(tmp_path):
    config = own_code_model(tmp_path / "model") / "config.json"
    described = json.loads(config.read_text())
    write(config, {**described, "auto_map": {"AutoModel": "org/other--modeling_own.OwnModel"}})
    with pytest.raises(DataError, match=r"in another repository \(org/other--modeling_own\.OwnModel\)"):
        trusted_copy(config.parent)
    write(config, described)
    (config.parent / "modeling_own.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(
        DataError, match=r"the code beside the weights does not run .*a_package_that_nobody_has"
    ):
        Encoder.load(trusted_copy(config.parent))
    (config.parent / "modeling_own.py").unlink()
    with pytest.raises(
        DataError, match=r"names code of its own \(modeling_own\.OwnConfig\), but has no \.py file"
    ):
        trusted_copy(config.parent)


def test_a_base_is_never_one(tmp_path):
    from embedloom.config.encoder import EncoderConfig

    folder = own_code_model(tmp_path / "model")
    with pytest.raises(DataError, match="a base is never one"):
        prepare_base(EncoderConfig(base=str(folder)), folder, tmp_path)


def test_own_code_under_a_known_model_type_is_run_instead_of_transformers_own(tmp_path):
    """Qwen3's configuration, and a class that answers with the mirror of its states."""
    bare = make_base(tmp_path / "bare", "Qwen3", head_dim=8)
    shutil.rmtree(bare / "chat_template.jinja", ignore_errors=True)
    config = json.loads((bare / "config.json").read_text())
    write(bare / "config.json", {**config, "auto_map": {"AutoModel": "modeling_own.Mirrored"}})
    (bare / "modeling_own.py").write_text(
        "from transformers import Qwen3Model\n\n\nclass Mirrored(Qwen3Model):\n"
        "    def forward(self, *arguments, **options):\n        output = super().forward(*arguments, **options)\n"
        "        output.last_hidden_state = output.last_hidden_state.flip(-1)\n        return output\n"
    )
    folder = write_old_layout(tmp_path / "model", bare, {"pooling_mode_mean_tokens": True})
    found = Encoder.load(trusted_copy(folder), dtype="float32", device="cpu")
    np.testing.assert_allclose(found.embed(TEXTS, "document"), library_vectors(folder)[1], atol=1e-5)
    plain = Encoder.load(folder, dtype="float32", device="cpu").embed(TEXTS, "document")
    np.testing.assert_allclose(found.embed(TEXTS, "document"), np.flip(plain, -1), atol=1e-5)


def test_the_endpoint_says_that_it_runs_such_code(tmp_path):
    from embedloom.serving.app import build_application

    folder = own_code_model(tmp_path / "model")
    with pytest.raises(DataError, match="run only by"):
        application(build_application, folder)
    bound = application(build_application, folder, trust_remote_code=True)
    spec, settings = bound[0], bound[1]
    assert settings.trust_remote_code and is_trusted(local_folder(spec.folder))


def application(build, folder, **serving):
    section = ServingConfig(require_gate=False, **serving)
    args = ApplicationArgs(model_folder=str(folder), served_name="own", serving=section)
    return build(args)._bound_deployment.init_args
