"""The page: what it is sent with, and what headless Chromium makes of it where there is one."""

import contextlib
import hashlib
import re
import shutil
import subprocess
import threading
import time

import httpx
import pytest
import uvicorn

from embedloom.serving.front import ApiKey
from embedloom.serving.schemas import CorpusCard, GateVerdict, SearchHit
from fakes_serving import FakeEncoder, api_of, client_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
SOURCE = 'https://docs.example.org/open?a=1&b="2"'
HOSTILE = "<img src=x onerror=\"document.title='broken into'\">"


class FixedCorpus:
    contract_hash = FakeEncoder(limit=128).contract.hash
    card = CorpusCard(documents=12345, dimension=8, index="exact", texts=True)

    def search(self, query, count, with_texts, words=None):
        texts = [HOSTILE, "The open() function returns a file object.", "تُفتح الملفات بالدالة open."]
        hits = [
            SearchHit(id=f"doc-{number}", score=0.9 - number / 4, title=f"Title {number}", text=text)
            for number, text in enumerate(texts)
        ]
        hits[0] = hits[0].model_copy(
            update={"source": HOSTILE, "url": "javascript:document.title='broken into'"}
        )
        hits[1] = hits[1].model_copy(update={"source": SOURCE, "url": SOURCE, "chunk": 2, "chunks": 5})
        hits[2] = hits[2].model_copy(update={"source": "مرجع/ملفات.md"})
        return hits


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
    link = '<a href="https://docs.example.org/open?a=1&amp;b=&quot;2&quot;" target="_blank" rel="noopener noreferrer nofollow">'
    assert dom.count(link) == dom.count("<a ") == 2  # title and source of the one hit that has an address
    assert "</a> · part 2 of 5 · doc-1" in dom and "مرجع/ملفات.md · doc-2" in dom


@needs_chromium
@pytest.mark.slow
def test_chromium_cuts_a_query_over_the_limit_and_says_so(tmp_path):
    with served(corpus=FixedCorpus()) as url:
        long = browse(f"{url}/?q={'wörter+' * 40}", tmp_path)
        short = browse(f"{url}/?q=words", tmp_path)
    said = r'<p id="cut" role="status">The query was cut: the model reads 128 tokens of a query, its instruction included\.</p>'
    assert re.search(said, long) and '<p id="error" role="alert"></p>' in long
    assert '<p id="cut" role="status"></p>' in short
    assert long.count("<li>") == short.count("<li>") == 3


@needs_chromium
@pytest.mark.slow
def test_an_open_page_asks_for_nothing_but_readiness(tmp_path):
    """It polls as long as it is open: whatever else it asked for would keep an idle endpoint at work."""
    with served(corpus=FixedCorpus()) as url:
        browse(url, tmp_path, "--virtual-time-budget=65000")
        counted = httpx.get(f"{url}/metrics", trust_env=False).text
    answered = {
        path: float(count)
        for path, count in re.findall(r'embedloom_requests_total{path="(.*?)",status="200"} (\S+)', counted)
    }
    assert answered.pop("/ready") > 2
    assert answered == {"/": 1, "/v1/models": 1}


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
