import json

import pytest

from embedloom.core.prompting import PromptContract
from embedloom.core.storage import Place
from embedloom.encoder.model import Encoder
from embedloom.encoder.parity import check_export, embed_golden
from embedloom.errors import DataError
from embedloom.training.checkpoints import STATE_FILE, check_resumable, is_model, save_final_model
from fakes_training import training_config


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
    folder = tmp_path / "model"
    config = training_config(matryoshka={"dimensions": [32, 8]})
    save_final_model(encoder, folder, config, embed_golden(encoder))
    assert is_model(folder)
    assert PromptContract.load(folder).matryoshka_dimensions == (8, 32)
    assert json.loads((folder / "config.json").read_text())["matryoshka_dimensions"] == [8, 32]
    assert Encoder.load(folder, dtype="float32").contract.matryoshka_dimensions == (8, 32)


def test_a_plain_model_keeps_the_contract_of_its_base(tiny_model, tmp_path):
    encoder = Encoder.load(tiny_model, dtype="float32")
    folder = tmp_path / "model"
    save_final_model(encoder, folder, training_config(), embed_golden(encoder))
    assert min(check_export(folder).values()) > 0.999999
    assert PromptContract.load(folder) == PromptContract.load(tiny_model)
