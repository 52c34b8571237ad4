"""The page: what it is sent with, and what headless Chromium makes of it where there is one."""

import contextlib
import hashlib
import re
import shutil
import subprocess
import threading
import time

import pytest
import uvicorn

from embedloom.serving.keys import ApiKey
from embedloom.serving.replies import CorpusCard, GateVerdict, SearchHit
from fakes_serving import FakeEncoder, api_of, client_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
HOSTILE = "<img src=x onerror=\"document.title='broken into'\">"


class FixedCorpus:
    contract_hash = FakeEncoder(limit=128).contract.hash
    card = CorpusCard(documents=12345, dimension=8, index="exact", texts=True)

    def search(self, query, count, with_texts):
        texts = [HOSTILE, "The open() function returns a file object.", "Paths are joined with a slash."]
        return [
            SearchHit(id=f"doc-{number}", score=0.9 - number / 4, title=f"Title {number}", text=text)
            for number, text in enumerate(texts)
        ]


@contextlib.contextmanager
def served(**options):
    server = uvicorn.Server(
        uvicorn.Config(api_of(FakeEncoder(limit=128), **options), port=0, log_level="warning", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def browse(url: str, folder, *flags: str) -> str:
    """The page's DOM after its scripts ran."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server", "--virtual-time-budget=4000",
        f"--user-data-dir={folder}", *flags, "--dump-dom", url,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def test_page_is_one_file_under_a_policy_that_lets_nothing_else_in():
    with client_of(FakeEncoder()) as client:
        reply = client.get("/")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/html")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", reply.text)
    assert "http://" not in reply.text and "https://" not in reply.text
    assert "innerHTML" not in reply.text
    assert len(reply.content) < 20_000


def test_page_needs_no_key_but_what_it_asks_for_does():
    key = ApiKey(name="page", sha256=hashlib.sha256(b"k").hexdigest())
    with client_of(FakeEncoder(), keys=(key,)) as client:
        assert client.get("/").status_code == 200
        assert client.get("/v1/models").status_code == 401


@needs_chromium
@pytest.mark.slow
def test_chromium_shows_results_card_and_health(tmp_path):
    gate = GateVerdict(verdict="passed")
    with served(corpus=FixedCorpus(), gate=gate) as url:
        dom = browse(f"{url}/?q=how+to+open+a+file", tmp_path)
    assert dom.count("<li>") == 3
    assert "The open() function returns a file object." in dom and "doc-1" in dom and "0.650" in dom
    assert re.search(r"3 results; embedded in [\d.]+ ms, searched in [\d.]+ ms", dom)
    assert '<span id="health" role="status" class="ready">ready</span>' in dom
    assert "passed" in dom and "12,345 documents" in dom and FixedCorpus.contract_hash in dom
    assert "broken into" not in re.search("<title>.*</title>", dom)[0] and "&lt;img" in dom


@needs_chromium
@pytest.mark.slow
def test_chromium_asks_for_a_key_and_without_a_corpus_ranks_lines(tmp_path):
    with served() as url:
        dom = browse(url, tmp_path / "a")
    assert '<label id="documents-field">' in dom and ">Rank</button>" in dom
    key = ApiKey(name="page", sha256="0" * 64)
    with served(keys=(key,)) as url:
        dom = browse(url, tmp_path / "b")
    assert '<label id="key-field">' in dom and 'class="ready"' in dom
