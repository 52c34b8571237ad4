import json

import pytest

from embedloom.encoder.model import Encoder
from embedloom.encoder.parity import check_export, embed_golden
from embedloom.errors import DataError
from embedloom.instructions import PromptContract
from embedloom.storage import Place
from embedloom.training.checkpoints import STATE_FILE, check_resumable, is_model, save_final_model


def test_checkpoints_of_another_config_are_refused_before_workers_start(tmp_path):
    folder = tmp_path / "run" / "step-00000003"
    folder.mkdir(parents=True)
    (folder / STATE_FILE).write_text(json.dumps({"fingerprint": "abc"}))
    check_resumable(Place(str(tmp_path)), "abc")
    with pytest.raises(DataError, match=r"step-00000003: checkpoint of another config .*'abc'.*'def'"):
        check_resumable(Place(str(tmp_path)), "def")


def test_nothing_to_resume_is_fine(tmp_path):
    check_resumable(Place(str(tmp_path / "absent")), "abc")


def test_a_matryoshka_model_says_so_in_contract_and_config(tiny_model, tmp_path):
    encoder = Encoder.load(tiny_model, dtype="float32")
    save_final_model(encoder, tmp_path, (32, 8), [], embed_golden(encoder))
    assert is_model(tmp_path)
    assert PromptContract.load(tmp_path).matryoshka_dimensions == (8, 32)
    assert json.loads((tmp_path / "config.json").read_text())["matryoshka_dimensions"] == [8, 32]
    assert Encoder.load(tmp_path, dtype="float32").contract.matryoshka_dimensions == (8, 32)


def test_a_plain_model_keeps_the_contract_of_its_base(tiny_model, tmp_path):
    encoder = Encoder.load(tiny_model, dtype="float32")
    save_final_model(encoder, tmp_path, None, [], embed_golden(encoder))
    assert min(check_export(tmp_path).values()) > 0.999999
    assert PromptContract.load(tmp_path) == PromptContract.load(tiny_model)
