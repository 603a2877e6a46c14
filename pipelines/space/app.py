"""The page of `tinyaudio serve` as a Hugging Face Space; the variable TINYAUDIO_MODEL names the model."""

from pathlib import Path

from tinyaudio.page import STYLE, build_page
from tinyaudio.request_queue import RequestQueue
from tinyaudio.transcribe import Transcriber, default_model

EXAMPLES = sorted(Path(__file__).with_name("examples").glob("*.*"))

requests = RequestQueue(Transcriber.load)
requests.wait_until_ready()
page = build_page(requests, default_model(), EXAMPLES)

if __name__ == "__main__":
    page.launch(css=STYLE)
