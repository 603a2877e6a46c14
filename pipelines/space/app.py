"""The page of `tinyaudio serve` as a Hugging Face Space; the variable TINYAUDIO_MODEL names the model."""

from pathlib import Path

from tinyaudio.page import build_page
from tinyaudio.transcribe import Transcriber

EXAMPLES = sorted(Path(__file__).with_name("examples").glob("*.*"))

page = build_page(Transcriber.load(), EXAMPLES)

if __name__ == "__main__":
    page.launch()
