"""The command line. ``embedloom.cli:main`` is the console script."""

from embedloom.cli.root import app, main

__all__ = ["app", "main"]
