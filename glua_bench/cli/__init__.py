"""The command line."""

from glua_bench.cli.main import app, main

__all__ = ["app", "main"]
