"""The `tinyaudio` command line. It parses, calls and prints; nothing imports it. `app.py` lists the commands."""

from tinyaudio.cli.app import main

__all__ = ["main"]
