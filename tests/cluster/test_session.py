"""A Ray that does not start is told as one line, and leaves nothing behind."""

from pathlib import Path

import pytest

from embedloom.cluster.session import ray_session
from embedloom.config.cluster import AuthConfig, Profile
from embedloom.core.command_output import command_output
from embedloom.core.storage import Place
from embedloom.errors import StageError


def test_a_ray_that_does_not_start_is_one_line_with_its_own_logs(tmp_path, monkeypatch):
    import ray

    folders: list[Path] = []

    def fail(**arguments: object) -> None:
        folder = Path(str(arguments["_temp_dir"]))
        folders.append(folder)
        (folder / "session_latest" / "logs").mkdir(parents=True)
        (folder / "session_latest" / "logs" / "gcs_server.err").write_text("why")
        raise Exception("\nThe current node timed out during startup.\nmore")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    place = Place(str(tmp_path / "run"))
    auth = AuthConfig(token_path=str(tmp_path / "token"))
    with (
        pytest.raises(StageError) as caught,
        command_output(place),
        ray_session(Profile(logical_cpus=2), auth),
    ):
        raise AssertionError
    assert str(caught.value) == "Ray did not start: The current node timed out during startup."
    assert caught.value.__notes__ == [f"logs: {place.uri}/logs"]
    assert (tmp_path / "run/logs/ray/gcs_server.err").read_text() == "why"
    assert folders and not folders[0].exists()
