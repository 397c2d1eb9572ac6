"""The command line: a thin shell over the public verbs."""

from bitknap.cli.command import main

__all__ = ["main"]
