"""Compressed bodies, decoded piece by piece as they arrive and never beyond a limit. No ASGI, no Ray."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import zstandard

from embedloom.serving.refusals import ApiError

CODINGS = ("gzip", "deflate", "zstd")
_ALIASES = {"x-gzip": "gzip"}
_MOST_CODINGS = 4
_PIECE_BYTES = 2**16  # decoded at a time
# Of zstd, which says of no input how much it makes of it: four bytes make 128 KiB at most, so these make 8 MiB.
_ZSTD_BYTES = 256
_ZSTD_WINDOW_BYTES = 8 * 2**20  # the most that RFC 9659 lets a sender use over HTTP


class BodyTooLarge(Exception):
    """The body grew past the limit while it was read."""


def codings_of(header: bytes) -> list[str]:
    """The codings of a Content-Encoding header, in the order in which they were applied.

    Raises:
        ApiError: 415, one that is not known here, or too many.
    """
    names = [name.strip().lower() for name in header.decode("latin-1").split(",")]
    names = [_ALIASES.get(name, name) for name in names if name not in ("", "identity")]
    unknown = [name for name in names if name not in CODINGS]
    if unknown or len(names) > _MOST_CODINGS:
        what = (
            f"{unknown[0]!r:.80} is not supported" if unknown else f"{len(names)} codings, one over another"
        )
        raise ApiError(
            415,
            f"content-encoding: {what}; allowed: {', '.join(CODINGS)}, at most {_MOST_CODINGS} of them",
            code="unsupported_content_encoding",
            headers={"accept-encoding": ", ".join(CODINGS)},
        )
    return names


class BodyDecoder:
    """Undoes the codings of one body."""

    def __init__(self, codings: Sequence[str], most_bytes: int) -> None:
        """Build one.

        Args:
            codings: in the order in which they were applied.
            most_bytes: of the body, after each of the codings.
        """
        self._stages = [_Stage(name, most_bytes) for name in reversed(codings)]

    def decode(self, piece: bytes, last: bool) -> bytes:
        """What a piece of the body stands for.

        Raises:
            BodyTooLarge: with it, there is more than the limit.
            ApiError: 400, it is not in that coding.
        """
        pieces: Iterator[bytes] = iter([piece])
        for stage in self._stages:
            pieces = stage.decode(pieces)
        found = b"".join(pieces)
        if last:
            for stage in self._stages:
                stage.end()
        return found


class _Inner(Protocol):
    def decode(self, piece: bytes) -> Iterator[bytes]: ...

    @property
    def complete(self) -> bool: ...


class _Stage:
    """One coding: counts what it makes, and names it in refusals."""

    def __init__(self, name: str, most_bytes: int) -> None:
        self._name = name
        self._left = most_bytes
        self._inner: _Inner = _Zstd() if name == "zstd" else _Zlib(name)

    def decode(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            try:
                for made in self._inner.decode(piece):
                    self._left -= len(made)
                    if self._left < 0:
                        raise BodyTooLarge
                    yield made
            except (zlib.error, zstandard.ZstdError) as error:
                raise self._broken(str(error)) from error

    def end(self) -> None:
        if not self._inner.complete:
            raise self._broken("it ends too early")

    def _broken(self, why: str) -> ApiError:
        return ApiError(400, f"the body is not valid {self._name}: {why}", code="invalid_content_encoding")


class _Zlib:
    """gzip, of one or several members; deflate, which some send with zlib's header, as they should, some without."""

    def __init__(self, name: str) -> None:
        self._gzip = name == "gzip"
        self._stream: zlib._Decompress | None = None
        self._begun = b""  # too little to tell what it is
        self.complete = False

    def decode(self, piece: bytes) -> Iterator[bytes]:
        piece = self._begun + piece
        while piece or self._stream is not None:
            if self._stream is None:
                if self.complete and not self._gzip:
                    raise zlib.error("something follows its end")
                if len(piece) < 2:
                    self._begun, self.complete = piece, False
                    return
                self._begun = b""
                self._stream, self.complete = zlib.decompressobj(self._window(piece)), False
            made = self._stream.decompress(piece, _PIECE_BYTES)
            if made:
                yield made
            if self._stream.eof:
                piece, self._stream, self.complete = self._stream.unused_data, None, True
                continue
            piece = self._stream.unconsumed_tail
            if not piece and len(made) < _PIECE_BYTES:
                return

    def _window(self, piece: bytes) -> int:
        if self._gzip:
            return 16 + zlib.MAX_WBITS
        has_header = piece[0] & 15 == 8 and (piece[0] << 8 | piece[1]) % 31 == 0
        return zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS


class _Zstd:
    """zstd, of one or several frames."""

    def __init__(self) -> None:
        self._stream: zstandard.ZstdDecompressionObj | None = None
        self._seen = False

    @property
    def complete(self) -> bool:
        return self._seen and self._stream is None

    def decode(self, piece: bytes) -> Iterator[bytes]:
        start = 0
        while start < len(piece):
            self._seen = True
            if self._stream is None:
                self._stream = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
            made = self._stream.decompress(piece[start : start + _ZSTD_BYTES])
            start = min(start + _ZSTD_BYTES, len(piece))
            if made:
                yield made
            if self._stream.eof:
                start -= len(self._stream.unused_data)
                self._stream = None
