"""What workers print reaches the command's logs through Ray, and their reports its screen."""

import time

import pytest

from embedloom.cluster.worker_output import concerns, heard, process_name
from embedloom.core.command_output import command_output, current_logs, failure_lines
from embedloom.core.progress import Report, shown_on
from embedloom.core.storage import Place
from embedloom.errors import StageError


class Recorder:
    def __init__(self) -> None:
        self.reports: list[Report] = []

    def show(self, report: Report) -> None:
        self.reports.append(report)


def batch(*lines: str, pid: object = 7, **fields: object) -> dict[str, object]:
    return {
        "lines": list(lines),
        "pid": pid,
        "is_err": True,
        "ip": "10.0.0.1",
        "localhost": "10.0.0.1",
        **fields,
    }


def test_a_process_is_named_by_its_actor_and_its_node_where_that_is_another():
    assert process_name(batch(actor_name="RayTrainWorker")) == "RayTrainWorker pid=7"
    assert process_name(batch(task_name="Map", ip="10.0.0.2")) == "Map pid=7 ip=10.0.0.2"
    assert process_name(batch(pid="raylet")) == "raylet"


def test_of_a_nodes_daemon_what_the_user_can_mend_is_shown(tmp_path, capsys):
    killed = "1 Workers (tasks / actors) killed due to memory pressure (OOM)"
    chatter = "WARNING: 8 PYTHON worker processes have been started on node"
    assert concerns(batch(killed, chatter, pid="raylet")) == [killed]
    assert concerns(batch(killed)) == []  # a worker's own words
    with command_output(Place(str(tmp_path))):
        heard(batch(killed, chatter, pid="raylet"))
    assert capsys.readouterr().err == f"[ray] {killed}\n"
    assert chatter in (tmp_path / "logs/workers.log").read_text()


def test_without_a_quiet_command_they_are_printed_as_ray_does(capsys):
    heard(batch("Setting up process group", actor_name="RayTrainWorker"))
    assert "(RayTrainWorker pid=7)" in capsys.readouterr().err


@pytest.mark.ray
def test_a_worker_that_dies_is_quoted_and_only_its_report_is_shown(ray_local, tmp_path, capsys):
    import ray

    @ray.remote(max_retries=0)
    def die() -> None:
        import os

        from embedloom.core.progress import Progress

        Progress("train a/b", 9, "steps", every_seconds=0.0).advance(3, loss=0.5)
        os.write(1, b"a library's line on descriptor 1\n")
        os.write(2, b"Fatal Python error: made up for a test\n")
        os._exit(3)

    place, screen = Place(str(tmp_path / "run")), Recorder()
    with pytest.raises(StageError), command_output(place), shown_on(screen):
        logs = current_logs()
        assert logs is not None
        try:
            ray.get(die.remote())
        except ray.exceptions.WorkerCrashedError as error:
            while not (logs.crashed() and "descriptor 1" in (logs.folder / "workers.log").read_text()):
                time.sleep(0.1)
            quoted = failure_lines(error, logs)
            raise StageError("it died") from error
    assert "  Fatal Python error: made up for a test" in quoted and quoted[-1] == f"logs: {place.uri}/logs"
    assert "Fatal" not in capsys.readouterr().err
    assert [(one.stage, one.done, one.values) for one in screen.reports] == [("train a/b", 3, {"loss": 0.5})]
