"""The page at ``/``: one file without outside assets, sent with a policy that lets nothing else run or load."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import Response

_PAGE = Path(__file__).with_name("page.html")


def page_reply() -> Response:
    """The page and its headers."""
    text = _PAGE.read_text(encoding="utf-8")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of('script', text)}",
            f"style-src {_hash_of('style', text)}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(text, headers=headers, media_type="text/html; charset=utf-8")


def _hash_of(tag: str, text: str) -> str:
    """The CSP source of the page's one inline element of this kind."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    if len(found) != 1:
        raise RuntimeError(f"{_PAGE.name}: {len(found)} inline {tag} elements, the policy knows one")
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()}'"
