import json

import pytest

from embedloom.core.prompting import PromptContract
from embedloom.core.storage import Place
from embedloom.encoder.model import Encoder
from embedloom.encoder.parity import check_export, embed_golden
from embedloom.errors import DataError
from embedloom.training.checkpoints import STATE_FILE, check_resumable, is_model, save_final_model
from fakes_training import training_config

ROUNDING = {"micro_batch_tokens": 4096, "zero_stage": 2, "gradient_checkpointing": False}


def save_state(folder, **state):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATE_FILE).write_text(json.dumps(state))


def test_checkpoints_of_another_config_are_refused_before_workers_start(tmp_path):
    save_state(tmp_path / "run" / "step-00000003", fingerprint="abc")
    assert check_resumable(Place(str(tmp_path)), lambda _: "abc", ROUNDING) == []
    with pytest.raises(DataError, match=r"step-00000003: checkpoint of another config .*'abc'.*'def'"):
        check_resumable(Place(str(tmp_path)), lambda _: "def", ROUNDING)


def test_what_decides_rounding_only_may_be_other_than_in_a_checkpoint_and_is_said(tmp_path):
    before = {"micro_batch_tokens": 8192, "zero_stage": 1, "gradient_checkpointing": False}
    save_state(tmp_path / "run" / "step-00000003", fingerprint="4096", rounding=ROUNDING)
    save_state(tmp_path / "run" / "step-00000006", fingerprint="8192", rounding=before)
    changed = check_resumable(Place(str(tmp_path)), lambda had: str(had["micro_batch_tokens"]), ROUNDING)
    assert changed == ["micro_batch_tokens 4096 (until now 8192)", "zero_stage 2 (until now 1)"]


@pytest.mark.parametrize(("before", "now", "allowed"), [(0, 2, "0"), (3, 0, "1, 2, 3")])
def test_zero_0_keeps_its_checkpoints_to_itself(before, now, allowed, tmp_path):
    save_state(
        tmp_path / "run" / "step-00000003", fingerprint="a", rounding={**ROUNDING, "zero_stage": before}
    )
    with pytest.raises(
        DataError, match=rf"zero_stage {before}, which zero_stage {now} .* allowed: {allowed},"
    ):
        check_resumable(Place(str(tmp_path)), lambda _: "a", {**ROUNDING, "zero_stage": now})


def test_nothing_to_resume_is_fine(tmp_path):
    assert check_resumable(Place(str(tmp_path / "absent")), lambda _: "abc", ROUNDING) == []


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
