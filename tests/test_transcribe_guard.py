"""The guard in transcription: loops are decoded again or cut, and every fault is in the warnings."""

from types import SimpleNamespace

import pytest
import torch
from scripted_decoder import is_retry, scripted

from tinyaudio.model.recognize import Options, Output, _ended
from tinyaudio.model.segments import Piece


def test_loop_is_decoded_again_and_the_clean_output_is_kept(model, processor, spoken):
    fake, recognizer = scripted(
        model, processor, lambda _, c: ("the cat sat", True) if is_retry(c) else ("cat " * 12, True)
    )
    (transcript,) = recognizer.stream([spoken[0][0]], Options())
    assert transcript.text == "the cat sat"
    assert transcript.warnings == ("repetition_retried",)
    assert [is_retry(config) for _, config in fake.asked] == [False, True]


def test_loop_that_stays_is_cut_and_reported(model, processor, spoken):
    _, recognizer = scripted(model, processor, lambda *_: ("the dog and " + "cat " * 12, False))
    (transcript,) = recognizer.stream([spoken[0][0]], Options())
    assert transcript.text == "the dog and cat"
    assert transcript.warnings == ("repetition",)
    assert transcript.segments[0].warnings == ("repetition",)


@pytest.mark.parametrize(
    ("text", "ends", "code"),
    [
        ("I'm an AI language model and I cannot transcribe", True, "refusal"),
        ("the cat sat on the", False, "truncated"),
        ("", True, "empty"),
        ("the cat sat on the mat " * 2 + "a dog and a cat " * 9, True, "repetition"),
        (
            "abc def ghi jkl mno pqr stu vwx yz " * 2 + "entirely other words follow here for a long while",
            True,
            "implausible_rate",
        ),
    ],
)
def test_every_fault_is_in_the_warnings(model, processor, spoken, text, ends, code):
    fake, recognizer = scripted(model, processor, lambda *_: (text, ends))
    (transcript,) = recognizer.stream([spoken[0][0][:20_000]], Options())
    assert transcript.warnings == (code,)
    assert len(fake.asked) == 2


def test_a_projectors_ctc_head_is_the_second_decoding(model, processor, spoken):
    fake, recognizer = scripted(model, processor, lambda *_: ("cat " * 12, True))
    path = processor.tokenizer(" the dog and")["input_ids"]
    fake.token_ctc = SimpleNamespace(best_path=lambda projected, lengths, embeddings: [path] * len(lengths))
    fake.config.ctc_weight = 0.3
    fake.project, fake.get_input_embeddings = model.project, model.get_input_embeddings
    (transcript,) = recognizer.stream([spoken[0][0]], Options(draft="none"))
    assert (transcript.text, transcript.warnings) == ("the dog and", ("repetition_retried",))
    assert len(fake.asked) == 1
    path.clear()  # what is left of the loop is better than nothing
    (transcript,) = recognizer.stream([spoken[0][0]], Options(draft="none"))
    assert (transcript.text, transcript.warnings) == ("cat", ("repetition",))


def test_a_line_break_ends_a_transcript(model, processor, spoken):
    """A language model that has hardly been trained writes the line again, and ends nowhere."""
    fake, recognizer = scripted(model, processor, lambda *_: ("\n the cat sat\n\n" + "the cat sat\n\n" * 9, False))
    (transcript,) = recognizer.stream([spoken[0][0][:20_000]], Options())
    assert (transcript.text, transcript.warnings, len(fake.asked)) == ("the cat sat", (), 1)
    ids = processor.tokenizer([" the cat sat \nthe dog", "a dog\n"])["input_ids"]
    assert processor.decode_transcripts(ids) == ["the cat sat", "a dog"]


def test_a_tokenizer_that_would_clean_up_spaces_changes_no_text(model, processor, spoken, monkeypatch):
    """Saved settings of a tokenizer must not pull "do n't ." together: that is not what the decoder wrote."""
    text = "we do n't know ."
    for name in ("", "_for_bpe_even_though_it_will_corrupt_output"):
        monkeypatch.setattr(processor.tokenizer, f"clean_up_tokenization_spaces{name}", True, raising=False)
    _, recognizer = scripted(model, processor, lambda *_: (text, True))
    ids = processor.tokenizer([text])["input_ids"]
    assert processor.tokenizer.batch_decode(ids) == ["we don't know."]
    assert processor.decode_transcripts(ids) == [text]
    (transcript,) = recognizer.stream([spoken[0][0][:20_000]], Options())
    assert transcript.text == text


def test_loop_is_cut_if_its_second_decoding_is_empty(model, processor, spoken):
    """The speech is too short for an empty second output to be a fault by itself."""
    _, recognizer = scripted(model, processor, lambda _, c: ("", True) if is_retry(c) else ("cat " * 12, True))
    samples = spoken[0][0][:16_000]
    piece = Piece(samples=samples, start_s=0.0, end_s=0.9, advance_s=1.0)
    assert recognizer.decode([piece], Options()) == [Output(text="cat", warnings=("repetition",))]


def test_a_row_stopped_at_its_budget_is_truncated_though_padding_is_end_of_text():
    """Many decoders are padded with end-of-text; rows stopped at 3, ended at 2, stopped at 4 and ended at 4."""
    tokens = torch.tensor([[5, 5, 5, 0], [5, 5, 0, 0], [5, 5, 5, 5], [5, 5, 5, 0]])
    assert _ended(tokens, 0, torch.tensor([3, 4, 4, 4])).tolist() == [False, True, False, True]
