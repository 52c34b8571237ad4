"""How many cores each thread computes with, and that a real encoder may be used by several at once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from embedloom.config.base import validate
from embedloom.config.cluster import ServeScaling
from embedloom.errors import ConfigError
from embedloom.serving.scheduling import ComputeStreams


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)  # also what threads started later begin with


def cores_of(streams: ComputeStreams, stream: int, alone: bool) -> int:
    def use() -> int:
        streams.use_cores(alone)
        return torch.get_num_threads()

    return streams.threads[stream].submit(use).result()


@pytest.mark.parametrize(("count", "cores", "share"), [(2, 2, 1), (2, 5, 2), (3, 3, 1), (1, 4, 4)])
def test_each_stream_has_its_share_and_all_cores_when_alone(count, cores, share):
    streams = ComputeStreams(count, cores)
    own = torch.get_num_threads()
    for stream in range(count):
        assert cores_of(streams, stream, alone=False) == share
    assert cores_of(streams, 0, alone=True) == cores
    assert cores_of(streams, count - 1, alone=False) == share
    assert torch.get_num_threads() == own  # a setting of each thread


def test_without_cores_torchs_setting_stays():
    streams = ComputeStreams(1)
    streams.threads[0].submit(torch.set_num_threads, 3).result()
    assert cores_of(streams, 0, alone=True) == 3


def test_an_encoder_gives_the_same_vectors_in_two_threads_at_once(tiny_model: Path):
    from embedloom.encoder.model import Encoder

    encoder = Encoder.load(tiny_model, threads=2, dtype="float32", device="cpu")
    batches = [
        [[5 + (n + k) % 20 for k in range(3 + n % 7)] for n in range(start, start + 9)] for start in range(30)
    ]
    expected = [encoder.embed_tokens(batch) for batch in batches]
    streams = ComputeStreams(2, 2)

    def embed(batch: list[list[int]]) -> np.ndarray:
        streams.use_cores(alone=False)
        return encoder.embed_tokens(batch)

    found = [streams.threads[number % 2].submit(embed, batch) for number, batch in enumerate(batches)]
    for future, vectors in zip(found, expected, strict=True):
        np.testing.assert_allclose(future.result(), vectors, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "streams"),
    [
        ({"threads": 1}, 1),
        ({"threads": 2}, 2),
        ({"cpus": 16}, 2),
        ({"threads": 8, "streams": 4}, 4),
        ({"gpus": 1, "cpus": 8}, 1),
    ],
)
def test_streams_by_default(content, streams):
    assert validate(ServeScaling, content, "c.yaml").compute_streams == streams


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"threads": 2, "streams": 3}, "streams is 3, above 2 threads"),
        ({"threads": 2, "streams": 2, "gpus": 0.5}, "streams is 2, but a replica with GPUs"),
    ],
)
def test_streams_that_cannot_be(content, message):
    with pytest.raises(ConfigError, match=message):
        validate(ServeScaling, content, "c.yaml")
