"""Environments of the systems we measure beside ours, each in a virtual environment of its own."""
