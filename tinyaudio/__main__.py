"""Runs the command line as `python -m tinyaudio`."""

from tinyaudio.cli import main

main()
