"""The `hub` command. Each module holds one group; heavy imports happen inside commands, so that `hub --help` is quick."""

from adapterhub.cli.main import app, main

__all__ = ["app", "main"]
