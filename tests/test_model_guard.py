"""The guard: the faults it finds, and honest speech that it accepts."""

import pytest

from tinyaudio.model.guard import CODES, cut_loop, find_loop, judge, token_budget


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("okay " * 12, "repetition"),
        ("thank you very much " * 5, "repetition"),
        ("so it goes on and on " + "it it it it it it it it", "repetition"),
        ("::::::::::::::", "repetition"),
        ("I'm an AI language model and I don't have the ability to transcribe audio", "refusal"),
        ("I\u2019m an AI and I cannot process audio", "refusal"),
        ("as a language model i do not hear things", "refusal"),
        ("i'm sorry but i can't help with that", "refusal"),
        ("i cannot listen to the audio file", "refusal"),
        ("Please provide the audio you would like me to transcribe", "refusal"),
        ("word " * 3 + "other things were said in a very short time by nobody", "implausible_rate"),
    ],
)
def test_known_failures_are_found(text, fault):
    assert judge(text, 1.0 if fault == "implausible_rate" else 10.0, is_complete=True) == fault
    assert fault in CODES


@pytest.mark.parametrize(
    "text",
    [
        "no no no no",
        "it was very very very good",
        "row row row your boat gently down the stream",
        "location location location",
        "the quick brown fox jumps over the lazy dog and the lazy dog does not mind the quick brown fox at all",
        "i am not a language model but a person",
        "ha ha ha ha",
        "i can't hear you very well could you speak up",
        "i cannot access the building before nine",
        "i'm an ai researcher and i like it here",
        "please provide an address",
        "",
    ],
)
def test_honest_speech_passes(text):
    assert judge(text, 8.0, is_complete=True) is None


def test_hardly_a_letter_for_seconds_of_speech_is_empty():
    assert judge("", 3.0, is_complete=True, speech_s=2.0) == "empty"
    assert judge(". ,", 3.0, is_complete=True, speech_s=2.0) == "empty"
    assert judge("uh", 12.0, is_complete=True, speech_s=10.0) == "empty"
    assert judge("", 3.0, is_complete=True, speech_s=0.6) is None, "a cough"
    assert judge("yes", 3.0, is_complete=True, speech_s=2.0) is None
    assert judge("", 3.0, is_complete=True) is None, "speech was not measured"


def test_output_without_an_end_is_truncated():
    assert judge("and then we", 3.0, is_complete=False) == "truncated"


def test_loop_is_cut_before_its_first_repetition():
    assert cut_loop("and then Okay, okay okay okay okay okay okay") == "and then Okay,"
    assert cut_loop("we say a b c a b c a b c a b c and leave") == "we say a b c"
    assert cut_loop("nothing wrong here") == "nothing wrong here"
    assert cut_loop("::::::::::::::") == ":"
    assert find_loop("a b c d") is None


def test_budget_grows_with_duration_up_to_the_limit():
    assert token_budget(0.0, 200) == 16
    assert token_budget(2.0, 200) == 36
    assert token_budget(60.0, 200) == 200
    assert token_budget(60.0, 4) == 4
