"""The exception tree. Every message names the thing, the value seen and what is allowed.

EmbedloomError            exit 1
├── UserError             exit 2: the config, the data or the machine must change
│   ├── ConfigError       a key or value of a YAML file or ``--set``
│   ├── DataError         a corpus, a table, a model folder, a manifest
│   └── MissingDependency an engine that an extra would install
├── StageError            a stage failed while running
└── ServeError            the endpoint could not be started or did not answer
"""

from collections.abc import Iterator


class EmbedloomError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class UserError(EmbedloomError):
    """Something the user gave is wrong; running again unchanged cannot help."""

    exit_code = 2


class ConfigError(UserError):
    """A config key or value is not allowed."""


class DataError(UserError):
    """A file, table, model folder or manifest is missing, empty or malformed."""


class MissingDependency(UserError):
    """A Python package is missing; the message names the extra, or the command, that installs it."""

    def __init__(self, package: str, extra: str, needed_for: str, command: str | None = None) -> None:
        install = command or f"pip install 'embedloom[{extra}]'"
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed; install it with: {install}"
        )
        self.package = package
        self.extra = extra
        self._arguments = (package, extra, needed_for, command)

    def __reduce__(self) -> tuple[type["MissingDependency"], tuple[str, str, str, str | None]]:
        """Pickle the arguments instead of the message, so that the error survives a Ray actor."""
        return MissingDependency, self._arguments


class StageError(EmbedloomError):
    """A pipeline stage failed while running."""


class ServeError(EmbedloomError):
    """The endpoint could not be started, or did not answer in time."""


def one_line(error: object, limit: int | None = None) -> str:
    """An error's message without line breaks, cut to ``limit`` characters."""
    return " ".join(str(error).split())[:limit]


def first_line(error: object) -> str:
    """The first line of a message that says anything, else the error's type."""
    return next(_lines(error), type(error).__name__)


def last_line(error: object) -> str:
    """The last line of a message, which in a traceback is the error's own; else the error's type."""
    return next(reversed(list(_lines(error))), type(error).__name__)


def _lines(error: object) -> Iterator[str]:
    return (line.strip() for line in str(error).splitlines() if line.strip())
