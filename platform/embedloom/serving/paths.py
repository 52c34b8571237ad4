"""Paths as clients really write them: what is meant beyond doubt is answered, for the rest a hint says what there is."""

import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

_SLASHES = re.compile("/{2,}")


class TidyPaths:
    """ASGI middleware: ``/v1//embeddings/`` is ``/v1/embeddings``, as a base URL with a slash at its end makes it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on one connection event."""
        if scope["type"] == "http":
            path: str = scope["path"]
            prefix = scope.get("root_path", "")
            if "//" in path or (path.endswith("/") and path.removeprefix(prefix) != "/"):
                tidy = _SLASHES.sub("/", path)
                tidy = tidy.rstrip("/") if tidy.removeprefix(prefix) != "/" else tidy
                scope = {**scope, "path": tidy, "raw_path": tidy.encode()}
        await self._app(scope, receive, send)


def hint(path: str, known: Iterable[str]) -> str:
    """What is said of a path that is not there: the one that its end names, where there is one.

    >>> hint("/v1/v1/embeddings", ["/v1/embeddings"])
    '; did you mean /v1/embeddings? A base URL ends with /v1 once'
    """
    last = path.rstrip("/").rsplit("/", 1)[-1]
    # The longest, so that /v1/rerank and not /rerank answers to /api/v1/rerank.
    ends = sorted((one for one in known if one != "/" and path.endswith(one)), key=len)
    named = ends[-1:] or sorted(one for one in known if last and one.rsplit("/", 1)[-1] == last)[-1:]
    if not named:
        return ""
    doubled = " A base URL ends with /v1 once" if "/v1/v1" in path else ""
    return f"; did you mean {named[0]}?{doubled}"
