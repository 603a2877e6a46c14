"""The page of `tinyaudio demo`, as a Hugging Face Space runs it. The model is named by the variable TINYAUDIO_MODEL."""

from pathlib import Path

from tinyaudio.page import build_page
from tinyaudio.transcribe import Transcriber

EXAMPLES = sorted(Path(__file__).with_name("examples").glob("*.*"))

page = build_page(Transcriber.load(), EXAMPLES)

if __name__ == "__main__":
    page.launch()
