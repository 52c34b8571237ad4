"""The number of replicas, by hand and over simulated traces, beside Serve's own policy."""

import asyncio
import importlib.util
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID, ReplicaMetricReport, TimeStampedValue
from ray.serve._private.config import DeploymentConfig

from embedloom.config.cluster import ServeScaling
from embedloom.config.serving import ApplicationArgs, ServingConfig
from embedloom.serving.app import build_encoders, scaling_on_queue
from embedloom.serving.autoscaling import Load, Scaler, load_of, wanted_replicas
from embedloom.serving.messages import EncodeJob, Part
from fakes_serving import FakeEncoder, service_of

_PATH = Path(__file__).parents[2] / "benchmarks/autoscaling.py"
_SPEC = importlib.util.spec_from_file_location("autoscaling_traces", _PATH)
traces = importlib.util.module_from_spec(_SPEC)
sys.modules["autoscaling_traces"] = traces
_SPEC.loader.exec_module(traces)

BUSY = Load(tokens_per_second=3000, rate=1000)  # three replicas' work, which four do at three quarters


def samples(*pairs):
    return [SimpleNamespace(timestamp=float(when), value=float(value)) for when, value in pairs]


def test_demand_is_kept_up_with_at_three_quarters_of_what_replicas_can():
    assert wanted_replicas(BUSY, 1.0) == pytest.approx(4.0)
    assert wanted_replicas(Load(rate=1000), 1.0) == 0.0


def test_what_waits_beyond_the_target_is_worked_off_in_half_a_minute():
    # 1,000 tokens may wait a second; 60,000 more are two replicas' work of 30 s.
    assert wanted_replicas(Load(queued_tokens=61_000, rate=1000), 1.0) == pytest.approx(2.0)
    assert wanted_replicas(Load(queued_tokens=900, rate=1000), 1.0) == 0.0
    # Requests that no replica has taken count by what requests had of late.
    same = Load(waiting_requests=61, tokens_per_request=1000, rate=1000)
    assert wanted_replicas(same, 1.0) == pytest.approx(2.0)


def test_replicas_are_added_at_once_and_taken_away_after_the_delay():
    scaler = Scaler(target_seconds=1.0, down_seconds=60.0, zero_seconds=600.0)
    assert scaler.decide(BUSY, 1, 100.0) == 4
    less = Load(tokens_per_second=300, rate=1000)
    assert [scaler.decide(less, 4, now) for now in (110.0, 130.0, 159.0)] == [4, 4, 4]
    assert scaler.decide(less, 4, 161.0) == 1


def test_a_dip_shorter_than_the_delay_changes_nothing():
    scaler = Scaler(1.0, 60.0, 600.0)
    less = Load(tokens_per_second=300, rate=1000)
    replicas = scaler.decide(BUSY, 1, 0.0)
    for now in range(1, 400):
        replicas = scaler.decide(BUSY if now % 50 == 0 else less, replicas, float(now))
        assert replicas == 4


def test_it_goes_to_zero_when_nobody_has_asked_for_long_enough_and_comes_back():
    scaler = Scaler(1.0, 60.0, 300.0)
    scaler.decide(Load(tokens_per_second=100, rate=1000), 1, 0.0)
    assert scaler.decide(Load(rate=1000), 1, 299.0) == 1
    assert scaler.decide(Load(rate=1000), 1, 300.0) == 0
    # None runs, so no rate is known; whoever waits is enough.
    assert scaler.decide(Load(), 0, 400.0) == 0
    assert scaler.decide(Load(waiting_requests=1), 0, 401.0) == 1
    assert scaler.decide(Load(rate=1000), 1, 402.0) == 1


def test_nothing_follows_from_tokens_before_a_rate_is_measured():
    assert Scaler(1.0, 60.0, 60.0).decide(Load(queued_tokens=1e9, tokens_per_second=1e9), 3, 0.0) == 3


def test_a_new_scaler_takes_nothing_away_before_it_has_watched():
    scaler = Scaler(1.0, 60.0, 600.0)
    less = Load(tokens_per_second=300, rate=1000)
    assert [scaler.decide(less, 8, now) for now in (0.0, 30.0, 59.0)] == [8, 8, 8]
    assert scaler.decide(less, 8, 60.0) == 1


def test_the_load_is_summed_over_running_replicas_and_their_window():
    reports = {
        # a began 20 s ago, of which the last 10 count; gone is a replica that ended.
        "demanded_tokens": {
            "a": samples((0, 0), (10, 5000), (20, 6000)),
            "b": samples((18, 0), (20, 400)),
            "gone": samples((0, 0), (20, 9e9)),
        },
        "demanded_requests": {"a": samples((10, 50), (20, 60)), "b": samples((18, 0), (20, 4))},
        "queued_tokens": {
            "a": samples((19, 9), (20, 70)),
            "b": samples((20, 30)),
            "gone": samples((20, 1e9)),
        },
        "tokens_per_second": {"a": samples((20, 1000)), "b": samples((20, 3000))},
    }
    load = load_of(reports, ["a", "b", "new"], 5.0)
    assert load == Load(100.0, 300.0, 2000.0, 5.0, 100.0)
    assert load_of({}, ["new"], 0.0) == Load()


def test_an_encoder_counts_what_it_was_asked_for_also_where_it_refuses():
    async def ask():
        service = service_of(FakeEncoder(), max_request_tokens=64, max_queued_tokens=64)
        service.measure()
        job = EncodeJob((Part("document", ["abcd"]),))
        await service.encode(job)
        first = service.load()
        refusal = await service.encode(replace(job, deadline=0.0))
        assert refusal.code == "overloaded"
        second = service.load()
        await service.close()
        return first, second

    first, second = asyncio.run(ask())
    assert (first["demanded_requests"], second["demanded_requests"]) == (1, 2)
    assert 0 < first["demanded_tokens"] < second["demanded_tokens"]
    assert first["queued_tokens"] == 0 and first["tokens_per_second"] > 0


def test_the_policy_travels_by_value_and_knows_what_the_config_says():
    config = scaling_on_queue(0, 8, 0.5, 90.0, 600.0)
    assert config.policy.policy_kwargs == {"target_seconds": 0.5, "down_seconds": 90.0, "zero_seconds": 600.0}
    sent = config.policy.get_serialized_policy_def()
    # What is by reference names its module; Serve's controller may not have ours.
    assert b"embedloom.core" not in sent and b"embedloom.config" not in sent
    policy = cloudpickle.loads(sent)(**config.policy.policy_kwargs)
    context = SimpleNamespace(
        total_queued_requests=0.0,
        raw_metrics={
            "demanded_tokens": {"a": samples((0, 0), (10, 30_000))},
            "tokens_per_second": {"a": samples((10, 1000))},
        },
        running_replicas=["a"],
        target_num_replicas=1,
        current_time=10.0,
    )
    assert policy(context) == (4, {})


def test_serves_controller_reads_the_settings_and_decides_by_what_replicas_report():
    config = DeploymentConfig(autoscaling_config=scaling_on_queue(0, 4, 1.0, 60.0, 600.0))
    read = DeploymentConfig.from_proto_bytes(config.to_proto_bytes())
    deployment = DeploymentID(name="encoder", app_name="scaled")
    state = DeploymentAutoscalingState(deployment)
    info = SimpleNamespace(
        deployment_config=read,
        config_changed=lambda other: True,
        target_capacity=None,
        target_capacity_direction=None,
    )
    assert state.register(info, 0) == 1  # a start shows that the model loads
    replica, now = ReplicaID("r", deployment), time.time()
    state.update_running_replica_ids([replica])

    def told(*values):
        return [
            TimeStampedValue(now - 4 * (len(values) - 1 - place), value) for place, value in enumerate(values)
        ]

    reported = {
        "demanded_tokens": told(0.0, 8000.0), "demanded_requests": told(0.0, 4.0),
        "queued_tokens": told(0.0), "tokens_per_second": told(1000.0),
    }  # fmt: skip
    state.record_request_metrics_for_replica(
        ReplicaMetricReport(replica_id=replica, timestamp=now, metrics=reported)
    )
    assert state.get_decision_num_replicas(1) == 3  # 2,000 tokens a second, of which a replica is to do 750


def test_requests_in_hand_stay_the_signal_where_they_are_stated(tiny_model):
    def scaled(**scaling):
        args = ApplicationArgs(
            model_folder=str(tiny_model),
            served_name="t",
            serving=ServingConfig(require_gate=False),
            scaling=ServeScaling(max_replicas=4, **scaling),
        )
        return build_encoders(args)._bound_deployment._deployment_config.autoscaling_config

    stated = scaled(target_ongoing_requests=8)
    assert stated.target_ongoing_requests == 8 and stated.policy.is_default_policy_function()
    own = scaled()
    assert own.policy.policy_function.endswith("QueueTimePolicy") and own.upscale_delay_s == 0


@pytest.mark.parametrize("name", ["step", "ramp", "bursts", "steady"])
def test_fewer_replica_hours_and_no_longer_waits_than_serves_own_policy(name):
    own, default = traces.simulate(name, *traces.ours()), traces.simulate(name, *traces.serves_default())
    assert own.replica_hours < 0.7 * default.replica_hours
    assert own.waited <= default.waited


@pytest.mark.parametrize("name", ["step", "bursts"])
def test_no_target_of_requests_does_as_well_at_the_same_waits(name):
    own = traces.simulate(name, *traces.ours())
    best = traces.serves_best(name, own.waited)
    assert best is None or own.replica_hours < best[1].replica_hours


@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_answered_within_five_seconds_and_a_steady_load_is_left_alone(seed):
    assert traces.simulate("step", *traces.ours(), marks=(600.0,), seed=seed).decided_seconds[0] <= 5.0
    # Up to what chance asks for, and hardly down again: at most once in a quarter of an hour.
    assert traces.simulate("steady", *traces.ours(), seed=seed).turns <= 4


def test_the_fleet_of_the_traces_waits_as_a_queue_does():
    # One replica, 20,000 tokens at once: a second's worth is done in the second they come, the rest in the next.
    fleet = traces.Fleet(lambda now: (0.0, 0.0), 0)
    fleet._queue.append([1.0, 20_000.0, 2.0])
    fleet.queued_tokens, fleet.queued_requests = 20_000.0, 2.0
    fleet.tick()
    fleet.tick()
    assert fleet.waits == [(0.0, 1.0), (1.0, 1.0)]
    assert fleet.queued_tokens == 0 and math.isclose(fleet.queued_requests, 0)
