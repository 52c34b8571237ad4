"""E-mail: single messages (.eml) and mailboxes (.mbox), by Python's own parser."""

import email
import re
from collections.abc import Iterator
from email.message import EmailMessage
from email.policy import default
from typing import Any

from embedloom.documents.outline import Blocks, Document
from embedloom.documents.web import html_text

_START = re.compile(
    rb"^From .*\r?\n", re.MULTILINE
)  # of a message in a mailbox; in bodies it is written ``>From``


def read_message(content: bytes, part: str = "") -> Document:
    """Subject as title; sender, recipients and date as first lines; then the body, of HTML where there is no plain one.

    Attachments are left out.

    Raises:
        ValueError: no message: it has none of the usual headers.
    """
    message = email.message_from_bytes(content, policy=default)
    assert isinstance(message, EmailMessage)  # noqa: S101 - what the policy makes
    headers = {
        name: str(message[name]).strip() for name in ("From", "To", "Date", "Subject") if message[name]
    }
    if not headers:
        raise ValueError("not an e-mail: it has no From, To, Date or Subject")
    blocks = Blocks()
    shown = [f"{name}: {value}" for name, value in headers.items() if name != "Subject"]
    body = message.get_body(preferencelist=("plain", "html"))
    if body is not None:
        text = _content(body)
        if body.get_content_subtype() == "html":
            blocks = html_text(text)
        else:
            for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
                blocks.text(paragraph)
    found = Blocks()
    found.text("\n".join(shown))
    found.extend(blocks)
    return found.document(stated=headers.get("Subject"), part=part)


def _content(body: Any) -> str:
    """Text of a body; in an encoding that nobody knows its ASCII."""
    try:
        return str(body.get_content())
    except (LookupError, UnicodeError):
        payload = body.get_payload(decode=True)
        return payload.decode("ascii", "replace") if isinstance(payload, bytes) else str(payload)


def read_mailbox(content: bytes) -> Iterator[Document]:
    """One document a message, numbered from 1.

    Raises:
        ValueError: the file does not begin with a message.
    """
    if not _START.match(content):
        raise ValueError("not a mailbox: it does not begin with 'From '")
    starts = list(_START.finditer(content))
    ends = [found.start() for found in starts[1:]] + [len(content)]
    for number, (start, end) in enumerate(zip(starts, ends, strict=True), start=1):
        yield read_message(content[start.end() : end], str(number))
