"""The `hub` command: one module per group; heavy imports happen inside commands, so that `hub --help` is quick."""

from adapterhub.cli.main import app, main

__all__ = ["app", "main"]
