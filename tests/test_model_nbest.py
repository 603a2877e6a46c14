"""The best texts of the projector's CTC head, and the decoder's choice among them."""

import itertools
import math

import pytest
import torch

from tinyaudio.model.ctc import TokenCTC
from tinyaudio.model.errors import ModelError
from tinyaudio.model.prompt import many_transcript_ids
from tinyaudio.model.recognize import DECODER_WEIGHT, Options
from tinyaudio.transcribe import Transcriber

NBEST = 8


def collapsed(path):
    """CTC's reading of a path: repeats are one, and class 0 is the blank."""
    return tuple(key for key, _ in itertools.groupby(path) if key != 0)


def test_sequences_have_the_probability_of_all_their_alignments():
    """Against every one of the 4**5 paths of a small head; the search is exact if all sequences fit its beam."""
    torch.manual_seed(0)
    head, embeddings = TokenCTC(3, 8), torch.randn(3, 8)
    head.bias.data.normal_()
    projected, lengths = torch.randn(2, 5, 8), torch.tensor([5, 3])
    for row, found in enumerate(head.best_texts(projected, lengths, embeddings, 1000)):
        vectors = torch.nn.functional.normalize(torch.cat([head.blank[None], embeddings]), dim=-1)
        cosines = torch.nn.functional.normalize(projected[row, : lengths[row]], dim=-1) @ vectors.T
        log_probs = (head.log_scale.exp() * cosines + head.bias).log_softmax(-1).tolist()
        expected = {}
        for path in itertools.product(range(4), repeat=int(lengths[row])):
            score = math.exp(sum(frame[one] for frame, one in zip(log_probs, path, strict=True)))
            expected[collapsed(path)] = expected.get(collapsed(path), 0.0) + score
        scores = {tuple(token + 1 for token in ids): score for ids, score in found}
        assert scores.keys() == expected.keys()
        assert scores == pytest.approx({path: math.log(score) for path, score in expected.items()}, abs=1e-4)
        assert [score for _, score in found] == sorted(scores.values(), reverse=True)


@pytest.fixture
def transcriber(model, processor):
    torch.manual_seed(3)
    model.add_token_ctc(torch.arange(20, 60))
    model.config.ctc_weight = 0.3
    for weight in model.decoder.parameters():
        weight.data *= 5 if weight.dim() == 2 else 1  # so that it does not find all texts equally probable
    return Transcriber(model, processor)


def test_the_text_is_the_one_that_both_find_most_probable(transcriber, spoken):
    """At any batch size; and the decoder has a say: by CTC alone other texts win."""
    model, tokenizer = transcriber.model, transcriber.processor.tokenizer
    sources, embeddings = [samples for samples, _ in spoken[:6]], model.get_input_embeddings().weight
    expected, by_ctc_alone = [], []
    for samples in sources:
        features, num_frames = model.encode(**transcriber.processor(samples))
        projected, lengths = model.project(features, num_frames)
        (found,) = model.token_ctc.best_texts(projected, lengths, embeddings, NBEST)
        texts = [" ".join(tokenizer.decode(ids, skip_special_tokens=True).split()) for ids, _ in found]
        scores = []
        for text, (_, score) in zip(texts, found, strict=True):
            (log_probs,) = model.target_log_probs(features, num_frames, many_transcript_ids(tokenizer, [text]))
            scores.append(score + DECODER_WEIGHT * float(log_probs.sum()))
        expected.append(texts[scores.index(max(scores))])
        by_ctc_alone.append(texts[0])
    for batch_size in (1, 4):
        outputs = transcriber.transcribe(sources, ctc_nbest=NBEST, batch_size=batch_size)
        sound = [number for number, one in enumerate(outputs) if not one.warnings]  # others were decoded again
        assert len(sound) >= 4
        assert [outputs[number].text for number in sound] == [expected[number] for number in sound]
    assert expected != by_ctc_alone


def test_nothing_is_generated(transcriber, spoken, monkeypatch):
    monkeypatch.setattr(type(transcriber.model), "generate", None)
    monkeypatch.setattr(type(transcriber.model), "generate_with_drafts", None)
    (done,) = transcriber.transcribe([spoken[0][0]], ctc_nbest=NBEST)
    assert (done.error, done.drafts) == (None, None)


def test_what_it_does_not_go_with_is_said(transcriber, spoken, model):
    source = [spoken[0][0]]
    for also in ({"num_beams": 4}, {"draft": "projector"}, {"generate": {"do_sample": True}}):
        with pytest.raises(ModelError, match="chooses a text and writes none"):
            list(transcriber.recognizer.stream(source, Options(ctc_nbest=NBEST, **also)))
    model.config.ctc_weight = 0.0
    with pytest.raises(ModelError, match=r"trained with train.ctc_weight above 0"):
        transcriber.transcribe(source, ctc_nbest=NBEST)
    for number in (0, 1, 101, 100_000):
        with pytest.raises(ValueError, match=f"ctc_nbest is {number}; expected 2 to 100"):
            Options(ctc_nbest=number)
