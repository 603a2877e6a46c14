"""`python -m tinyaudio` is `tinyaudio`."""

from tinyaudio.cli import main

main()
