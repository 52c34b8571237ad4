"""Shared fixtures: one small Ray for the whole session, tiny real models, no network."""

import os
import socket
import tempfile
import time
from pathlib import Path

# Before any test imports Ray or transformers: offline, quiet, and a token file outside the user's home.
_STATE = tempfile.mkdtemp(prefix="el-test-", dir="/tmp")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN_PATH=f"{_STATE}/auth_token",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_TRAIN_V2_ENABLED="1",
    DS_ACCELERATOR="cpu",
)

import pytest
from hypothesis import settings

from embedloom.config.cluster import AuthConfig, Profile
from fakes import make_tiny_encoder, make_tiny_llama

# A deadline would be a timed assertion: it failed a test on a busy machine.
settings.register_profile("embedloom", deadline=None)
settings.load_profile("embedloom")


_BEGUN = time.monotonic()
# The way from end to end, which --minutes has to leave time for.
_FIRST = (
    "pipeline/test_graph.py", "serving/test_endpoint.py", "training/test_stage.py", "mining/", "evaluation/",
    "test_init.py", "serving/test_deploy.py", "compute/", "corpus/", "test_quickstart_llama.py",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """--minutes, for a CI whose time is limited on machines of different speed."""
    parser.addoption("--minutes", type=float, help="begin no test after so many minutes; those are skipped")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --minutes, the way from end to end first."""
    if config.getoption("--minutes") is None:
        return
    here = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        name = item.path.relative_to(here).as_posix()
        return next((number for number, first in enumerate(_FIRST) if name.startswith(first)), len(_FIRST))

    items.sort(key=rank)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, and say so, what is left when the time given by --minutes is over."""
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - _BEGUN > 60 * minutes:
        pytest.skip(f"not begun within {minutes:g} minutes")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer causal Llama with a byte-level tokenizer and a chat template."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as an embedding model folder: bidirectional, mean-pooled, with contract.json."""
    return make_tiny_encoder(tiny_llama, tmp_path_factory.mktemp("tiny-encoder"))


def _free_port() -> int:
    """A port nobody listens on, so that a Ray of another run on this machine is not in the way."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def ray_local():
    """A private Ray of eight logical CPUs on this machine."""
    from embedloom.cluster.session import PACKAGE_ROOT, ray_session

    # Workers unpickle test classes by module name, so they need tests/ beside the package.
    tests = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PACKAGE_ROOT), tests])
    with ray_session(
        Profile(logical_cpus=8, object_store_mib=200, dashboard_port=_free_port()),
        AuthConfig(token_path=f"{_STATE}/auth_token"),
    ):
        yield
