"""Compressed bodies: by the reference implementations of each coding, cut anywhere, bombs, and what is none."""

import gzip
import itertools
import json
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from embedloom.serving.decoding import BodyDecoder, BodyTooLarge, codings_of
from embedloom.serving.refusals import ApiError
from fakes_serving import FakeEncoder, client_of, refused


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def two_members(data: bytes) -> bytes:
    return gzip.compress(data[:3]) + gzip.compress(data[3:])


def two_frames(data: bytes) -> bytes:
    return zstandard.compress(data[:3]) + zstandard.compress(data[3:])


def streamed_zstd(data: bytes) -> bytes:
    packer = zstandard.ZstdCompressor().compressobj()
    return packer.compress(data) + packer.flush()


CODINGS = {
    ("gzip",): gzip.compress, ("gzip", "several"): two_members, ("deflate",): zlib.compress, ("deflate", "raw"): raw_deflate,
    ("zstd",): zstandard.compress, ("zstd", "several"): two_frames, ("zstd", "streamed"): streamed_zstd,
}  # fmt: skip


def decoded(codings, body: bytes, cuts=(), most: int = 10**6) -> bytes:
    decoder = BodyDecoder(codings, most)
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = [body[start:end] for start, end in itertools.pairwise(edges)]
    return b"".join(decoder.decode(piece, False) for piece in pieces) + decoder.decode(b"", True)


@given(st.sampled_from(sorted(CODINGS)), st.binary(max_size=3000), st.lists(st.integers(0, 3000), max_size=6))
def test_a_body_is_what_was_compressed_wherever_it_is_cut(coding, data, cuts):
    assert decoded(coding[:1], CODINGS[coding](data), cuts) == data


@given(
    st.lists(st.sampled_from([("gzip",), ("deflate",), ("zstd",)]), min_size=2, max_size=4),
    st.binary(max_size=500),
)
def test_several_codings_are_undone_in_reverse(codings, data):
    body = data
    for coding in codings:
        body = CODINGS[coding](body)
    assert decoded([name for (name,) in codings], body, (10, 20)) == data


@pytest.mark.parametrize("coding", sorted(CODINGS), ids="-".join)
def test_a_bomb_stops_at_the_limit(coding):
    bomb = CODINGS[coding](bytes(40 * 2**20))
    tracemalloc.start()
    with pytest.raises(BodyTooLarge):
        decoded(coding[:1], bomb, most=2**20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(bomb) * 2 + 24 * 2**20


def test_a_bomb_in_a_bomb_and_one_that_comes_to_nothing_stop_too():
    inside = gzip.compress(bytes(40 * 2**20))
    with pytest.raises(BodyTooLarge):
        decoded(["gzip", "gzip"], gzip.compress(inside), most=2**20)
    empty = gzip.compress(gzip.compress(b"") * 10**5)
    with pytest.raises(BodyTooLarge):
        decoded(["gzip", "gzip"], empty, most=2**20)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_what_is_broken_is_named(coding):
    whole = CODINGS[(coding,)](b"some text that is compressed" * 10)
    for body in (
        b"",
        whole[:1],
        whole[:-1],
        whole[: len(whole) // 2],
        b"not compressed at all, not compressed",
    ):
        with pytest.raises(ApiError, match=f"not valid {coding}") as seen:
            decoded([coding], body)
        assert seen.value.status == 400
    with pytest.raises(ApiError):
        decoded([coding], whole + b"rubbish")


def test_a_window_larger_than_http_allows_is_refused():
    wide = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    with pytest.raises(ApiError, match="zstd"):
        decoded(["zstd"], packer.compress(b"x" * 1000) + packer.flush())


@pytest.mark.parametrize(
    ("header", "codings"),
    [
        (b"", []),
        (b"identity", []),
        (b"GZip", ["gzip"]),
        (b"x-gzip", ["gzip"]),
        (b"deflate, identity , zstd", ["deflate", "zstd"]),
    ],
)
def test_the_header_names_codings_in_any_case(header, codings):
    assert codings_of(header) == codings


@pytest.mark.parametrize("header", [b"br", b"gzip, br", b"compress", b"gzip gzip", b"gzip" + b",gzip" * 4])
def test_other_codings_are_415_by_name(header):
    with pytest.raises(ApiError, match="content-encoding") as seen:
        codings_of(header)
    assert seen.value.status == 415 and seen.value.headers["accept-encoding"] == "gzip, deflate, zstd"


BODY = json.dumps({"model": "tiny", "input": ["größer", "b"]}).encode()


@pytest.mark.parametrize("coding", sorted(CODINGS), ids="-".join)
def test_over_http_a_compressed_body_is_the_same_request(coding):
    headers = {"content-type": "application/json", "content-encoding": coding[0]}
    with client_of(FakeEncoder()) as client:
        plain = client.post(
            "/v1/embeddings", content=BODY, headers={"content-type": "application/json"}
        ).json()
        assert client.post("/v1/embeddings", content=CODINGS[coding](BODY), headers=headers).json() == plain


def test_over_http_bombs_are_413_and_the_unknown_is_415():
    def send(client, body, coding):
        headers = {"content-type": "application/json", "content-encoding": coding}
        return client.post("/v1/embeddings", content=body, headers=headers)

    with client_of(FakeEncoder(), max_body_bytes=10_000) as client:
        for coding in (("gzip",), ("deflate",), ("zstd",)):
            assert (
                refused(send(client, CODINGS[coding](bytes(10**7)), coding[0]), 413)["code"]
                == "body_too_large"
            )
            assert refused(send(client, BODY, coding[0]), 400)["code"] == "invalid_content_encoding"
        reply = send(client, BODY, "br")
        assert "'br' is not supported" in refused(reply, 415)["message"]
        assert reply.headers["accept-encoding"] == "gzip, deflate, zstd"


@pytest.mark.parametrize("coding", [None, "gzip"])
def test_a_byte_order_mark_is_ignored(coding):
    body = b"\xef\xbb\xbf" + BODY
    headers = {"content-type": "application/json"} | ({"content-encoding": coding} if coding else {})
    with client_of(FakeEncoder()) as client:
        reply = client.post(
            "/v1/embeddings", content=gzip.compress(body) if coding else body, headers=headers
        )
        assert reply.status_code == 200, reply.text


def test_codings_in_headers_of_their_own_are_all_undone():
    headers = [
        ("content-type", "application/json"),
        ("content-encoding", "gzip"),
        ("content-encoding", "zstd"),
    ]
    with client_of(FakeEncoder()) as client:
        reply = client.post(
            "/v1/embeddings", content=zstandard.compress(gzip.compress(BODY)), headers=headers
        )
        assert reply.status_code == 200, reply.text
