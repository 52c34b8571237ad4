"""API keys: who asks, and how much they may ask for.

Only hashes are kept. A plain SHA-256 is enough because keys are meant to be random (``openssl rand -hex 32``): there
is no dictionary to try. ``printf %s "$KEY" | sha256sum`` gives the hash for the key document:

    search-page: {sha256: 9f86…, requests_per_minute: 600, tokens_per_minute: 2000000}
"""

import hashlib
import hmac
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import Field

from embedloom.config.base import FrozenConfig, validate
from embedloom.config.serving import ServingConfig
from embedloom.errors import ConfigError
from embedloom.serving.refusals import ApiError

_HASH = re.compile(r"[0-9a-f]{64}")
_BEARER = re.compile(rb"(?i:bearer)[ \t]+(\S+)[ \t]*")
_ALLOWED = "Authorization: Bearer KEY, or api-key: KEY"


class ApiKey(FrozenConfig):
    """One client: the hash of its key and its quotas."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    sha256: str
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)


def read_keys(config: ServingConfig) -> tuple[ApiKey, ...]:
    """The keys that a serving section points to; none where it points nowhere.

    Raises:
        ConfigError: file or variable missing, empty or malformed; no message repeats what might be a key.
    """
    if config.keys_file is not None:
        path = Path(config.keys_file).expanduser()
        if not path.is_file():
            raise ConfigError(f"serving.keys_file: {path}: no such file")
        return parse_keys(path.read_text(), str(path))
    if config.keys_variable is not None:
        text = os.environ.get(config.keys_variable)
        if text is None:
            raise ConfigError(f"serving.keys_variable: {config.keys_variable} is not in the environment")
        return parse_keys(text, f"${config.keys_variable}")
    return ()


def parse_keys(text: str, source: str) -> tuple[ApiKey, ...]:
    """Read a key document.

    Raises:
        ConfigError: see ``read_keys``.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not readable as YAML") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{source}: holds no keys; expected name: {{sha256: ...}}")
    keys = []
    for name, values in content.items():
        if isinstance(values, dict) and "sha256" not in values:  # perhaps misspelt, which the model says best
            validate(ApiKey, {"name": str(name), **values}, f"{source}: {name}")
        if not isinstance(values, dict) or not _HASH.fullmatch(str(values.get("sha256", ""))):
            raise ConfigError(
                f"{source}: {name}: sha256 is missing or is not 64 lower-case hex digits (the hash of the key)"
            )
        keys.append(validate(ApiKey, {"name": str(name), **values}, f"{source}: {name}"))
    if len({key.sha256 for key in keys}) != len(keys):
        raise ConfigError(f"{source}: two names have the same key")
    return tuple(keys)


class Quota:
    """So many a minute, a minute's worth at once; what is taken beyond it is made up for before more is given."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._most = float(per_minute)
        self._clock = clock
        self._left = self._most
        self._seen = clock()

    def seconds_until(self, amount: float) -> float:
        """How long until so much is left; 0 when it is."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._seen) * self._most / 60)
        self._seen = now
        return max(0.0, (amount - self._left) * 60 / self._most)

    def take(self, amount: float) -> None:
        """Use some up."""
        self._left -= amount


class Client:
    """A known client and what is left of its quotas."""

    def __init__(self, key: ApiKey, clock: Callable[[], float]) -> None:
        self.name = key.name
        self.digest = key.sha256
        self._requests = Quota(key.requests_per_minute, clock) if key.requests_per_minute else None
        self._tokens = Quota(key.tokens_per_minute, clock) if key.tokens_per_minute else None

    def begin(self) -> None:
        """Count one request.

        Raises:
            ApiError: 429, a quota is used up; Retry-After says until when.
        """
        # Tokens are known only afterwards, so the last request of a minute may overdraw; the next one waits for it.
        for quota, amount, unit in ((self._requests, 1.0, "requests"), (self._tokens, 1.0, "tokens")):
            if quota is not None and (seconds := quota.seconds_until(amount)) > 0:
                raise ApiError(
                    429,
                    f"the {unit} per minute of this key are used up; try again in {seconds:.0f} s",
                    code="rate_limit_exceeded",
                    retry_after_seconds=seconds,
                )
        if self._requests is not None:
            self._requests.take(1)

    def charge(self, tokens: int) -> None:
        """Count tokens that were computed."""
        if self._tokens is not None:
            self._tokens.take(tokens)


class KeyRing:
    """All clients of an endpoint."""

    def __init__(self, keys: Sequence[ApiKey], clock: Callable[[], float] = time.monotonic) -> None:
        self._clients = [Client(key, clock) for key in keys]

    def identify(self, authorization: bytes | None, api_key: bytes | None = None) -> Client:
        """The client whose key stands in an Authorization header, or in Azure's.

        Every hash is compared, each in constant time, so that how long it takes tells nothing. Where both headers are
        there, either may hold the key: gateways put credentials of their own into Authorization.

        Raises:
            ApiError: 401, no key or an unknown one.
        """
        if authorization is None and api_key is None:
            raise ApiError(401, f"no API key; send the header {_ALLOWED}", code="missing_api_key")
        given = _BEARER.fullmatch(authorization or b"")
        secrets = [given.group(1) if given else b""] + ([api_key.strip()] if api_key is not None else [])
        found: Client | None = None
        for secret in secrets:
            digest = hashlib.sha256(secret).hexdigest()
            for client in self._clients:
                if hmac.compare_digest(client.digest, digest) and secret:
                    found = client
        if found is None:
            raise ApiError(401, f"the API key is not known here; allowed: {_ALLOWED}", code="invalid_api_key")
        return found


def key_headers(headers: Mapping[bytes, bytes]) -> tuple[bytes | None, bytes | None]:
    """The headers that may hold a key: Authorization, and Azure's ``api-key`` or its other spelling."""
    return headers.get(b"authorization"), headers.get(b"api-key") or headers.get(b"x-api-key")
