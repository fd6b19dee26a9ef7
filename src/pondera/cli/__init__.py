"""The command line: thin; it parses, calls and prints."""

from pondera.cli._app import main

__all__ = ["main"]
