"""The version of tinyaudio, for every package of this repository."""

__version__ = "0.1.0"
