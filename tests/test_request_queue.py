"""The request queue: the command line's texts, fair turns, bounded memory, places given back."""

import io
import queue as queues
import threading
import time

import numpy as np
import pytest
import torch
from audio_files import with_av
from conftest import with_pauses
from scripted_decoder import scripted

from tinyaudio.model import voice
from tinyaudio.model.align import BLANK
from tinyaudio.model.recognize import Options
from tinyaudio.request_queue import NotReadyError, QueueFullError, RequestQueue

FEW = {"max_new_tokens": 3, "num_beams": 1}


@pytest.fixture
def started():
    """Make queues, and stop them after the test."""
    made = []

    def start(transcriber, options=None, **settings):
        made.append(RequestQueue(lambda: transcriber, options or Options(**FEW), **settings))
        made[-1].wait_until_ready()
        return made[-1]

    yield start
    for queue in made:
        queue.stop()
    assert not [t for t in threading.enumerate() if t.name.startswith("tinyaudio-")]


def submit(queue, source, **options):
    ticket, updates = queue.enter(), queues.SimpleQueue()
    ticket.submit(source, updates.put, **options)
    return ticket, updates


def finish(ticket, updates):
    """Wait for the transcript; the segments of all updates are its segments."""
    segments = []
    while True:
        update = updates.get(timeout=60)
        assert update.failure is None
        segments += update.segments
        if update.transcript is not None:
            assert tuple(segments) == update.transcript.segments
            ticket.leave()
            return update.transcript


@pytest.fixture
def recordings(spoken):
    """Short ones, long ones with pauses, long ones without, silence."""
    talk = with_pauses(samples for samples, _ in spoken[:6])
    no_pause = np.concatenate([samples for samples, _ in spoken[6:12]])
    return [*(samples for samples, _ in spoken[:8]), talk, no_pause, np.zeros(48_000, np.float32)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_transcripts_are_those_of_the_command_line(transcriber, started, recordings, batch_size):
    expected = transcriber.transcribe(recordings, **FEW)
    queue = started(transcriber, Options(batch_size=batch_size, **FEW))
    got = [finish(*each) for each in [submit(queue, samples) for samples in recordings]]
    assert [t.to_dict() for t in got] == [t.to_dict() for t in expected]
    assert queue.num_requests == 0


def test_scores_are_for_those_who_ask(transcriber, started, with_head, spoken):
    """Requests of both kinds share a batch; what one did not ask for, warnings included, it does not get."""
    head = with_head.ctc_head
    silence = torch.nn.functional.one_hot(torch.tensor(head.alphabet[BLANK]), head.linear.out_features).float()
    head.forward = lambda features: silence.clamp(1e-6).log().expand(*features.shape[:2], -1)
    samples = spoken[0][0]
    plain, sure, timed = (
        transcriber.transcribe([samples], **FEW, **options)[0].to_dict()
        for options in ({}, {"confidence": True}, {"word_timestamps": True})
    )
    assert "unheard" in sure["warnings"]
    assert "unheard" not in plain["warnings"]
    queue = started(transcriber, Options(batch_size=4, **FEW))
    options = [{}, {"confidence": True}, {"word_timestamps": True}, {}]
    got = [finish(*each).to_dict() for each in [submit(queue, samples, **each) for each in options]]
    for one, expected in zip(got, (plain, sure, timed, plain), strict=True):
        assert one["warnings"] == expected["warnings"]
        (segment,), (same,) = one["segments"], expected["segments"]
        assert segment.keys() == same.keys()
        assert segment.get("avg_logprob") == pytest.approx(same.get("avg_logprob"), abs=1e-3)


def test_an_unreadable_file_is_a_transcript_with_its_error(transcriber, started, tmp_path):
    queue = started(transcriber)
    (tmp_path / "text.wav").write_text("no sound\n" * 100)
    assert "not readable as audio" in finish(*submit(queue, tmp_path / "text.wav")).error
    assert "does not exist" in finish(*submit(queue, tmp_path / "nowhere.wav")).error


def slow_queue(transcriber, started, batches, batch_size=2, **settings):
    """A queue whose batches take 20 ms, and note the numbers of their requests."""
    _, recognizer = scripted(transcriber.model, transcriber.processor, lambda *_: ("the cat", True))
    transcriber.recognizer = recognizer
    decode = recognizer.decode

    def slow(pieces, options):
        batches.append([piece.input for piece in pieces])
        time.sleep(0.02)
        return decode(pieces, options)

    recognizer.decode = slow
    return started(transcriber, Options(batch_size=batch_size), **settings)


def test_a_sentence_does_not_wait_for_an_hour(transcriber, started, spoken):
    batches = []
    queue = slow_queue(transcriber, started, batches, batch_size=1)
    talk = with_pauses(samples for samples, _ in spoken[:5])
    long = submit(queue, np.tile(talk, 20))
    while len(batches) < 5:
        time.sleep(0.01)
    begun = len(batches)
    finish(*submit(queue, spoken[0][0]))
    (served,) = [number for number, batch in enumerate(batches) if 1 in batch]
    assert served - begun < 12, "a batch or two, and those decoded while the sentence was read; the long one has 100"
    assert len(finish(*long).segments) == 100


def test_requests_are_served_first_come_first_served(transcriber, started, spoken):
    """The first ones too: a queue that is ready has loaded the voice detector, which takes longer than a slice."""
    voice._load_model.cache_clear()
    batches = []
    queue = slow_queue(transcriber, started, batches)
    assert voice._load_model.cache_info().currsize == 1
    requests = [submit(queue, spoken[0][0]) for _ in range(12)]
    for each in requests:
        finish(*each)
    served = [number for batch in batches for number in batch]
    assert all(abs(place - number) <= 2 for place, number in enumerate(served)), "two readers, and two in a batch"


def test_pieces_are_read_ahead_but_not_without_end(transcriber, started, spoken):
    batches = []
    queue = slow_queue(transcriber, started, batches)
    talk = with_pauses(samples for samples, _ in spoken[:5])
    requests = [submit(queue, np.tile(talk, 10)) for _ in range(4)]
    most = 0
    while len(batches) < 20:
        most = max(most, sum(len(ticket.pending) for ticket, _ in requests))
        time.sleep(0.002)
    for ticket, _ in requests:
        ticket.leave()
    assert 0 < most <= queue._max_pieces + 4


def test_one_that_goes_away_frees_its_place_at_once_and_its_pieces_are_not_decoded(transcriber, started, spoken):
    batches = []
    queue = slow_queue(transcriber, started, batches, max_requests=1)
    ticket, updates = submit(queue, np.tile(with_pauses([spoken[0][0]]), 60))
    updates.get(timeout=60)
    with pytest.raises(QueueFullError, match="all 1 places"):
        queue.enter()
    ticket.leave()
    ticket.leave()
    assert queue.num_requests == 0
    time.sleep(0.1)
    begun = len(batches)
    time.sleep(0.3)
    assert len(batches) == begun
    finish(*submit(queue, spoken[1][0]))


def test_too_long_a_recording_is_read_only_as_far_as_is_allowed(transcriber, started, spoken):
    batches = []
    queue = slow_queue(transcriber, started, batches, max_duration_s=12)
    ticket, updates = submit(queue, np.tile(with_pauses([spoken[0][0]]), 400))
    while (update := updates.get(timeout=60)).transcript is None:
        pass
    assert ticket.is_too_long
    assert "at most 12 s" in update.transcript.error
    assert ticket.num_samples <= 22 * 16_000


def test_a_batch_that_fails_ends_its_requests_only(transcriber, started, spoken, caplog):
    queue = started(transcriber)
    decode = transcriber.recognizer.decode
    transcriber.recognizer.decode = lambda *_: 1 / 0
    ticket, updates = submit(queue, spoken[0][0])
    while (update := updates.get(timeout=60)).failure is None:
        pass
    assert isinstance(update.failure, ZeroDivisionError)
    assert "a batch failed" in caplog.text
    ticket.leave()
    transcriber.recognizer.decode = decode
    assert finish(*submit(queue, spoken[0][0])).error is None


def test_a_closed_queue_finishes_what_has_a_place(transcriber, started, spoken):
    queue = started(transcriber)
    ticket = queue.enter()
    queue.close()
    with pytest.raises(NotReadyError, match="shutting down"):
        queue.enter()
    updates = queues.SimpleQueue()
    ticket.submit(spoken[0][0], updates.put)
    assert finish(ticket, updates).text


def test_a_model_that_cannot_be_loaded_is_reported():
    def fail():
        raise ValueError("no such model")

    queue = RequestQueue(fail)
    with pytest.raises(ValueError, match="no such model"):
        queue.wait_until_ready()
    with pytest.raises(NotReadyError, match="being loaded"):
        queue.enter()
    queue.stop()


def test_a_file_object_is_read_in_place_and_closed(transcriber, started, talk):
    queue = started(transcriber)
    with talk.open("rb") as file:
        finish(*submit(queue, file))
        assert file.closed


def test_a_request_chooses_its_audio_track(started, transcriber, spoken):
    tracks = [np.repeat(samples, 3) for samples, _ in spoken[:2]]
    film = with_av("matroska", "flac", *tracks, rate=48_000)
    queue = started(transcriber)
    got = [finish(*submit(queue, io.BytesIO(film), track=track)) for track in (None, 1, 2)]
    expected = [transcriber.transcribe([film], track=track, **FEW)[0] for track in (None, 1, 2)]
    assert [one.text for one in got] == [one.text for one in expected]
    assert [one.duration_s for one in got] == [one.duration_s for one in expected]
    assert len({one.duration_s for one in got}) == 2
    assert "3" in finish(*submit(queue, io.BytesIO(film), track=3)).error
    assert [("several_tracks" in one.warnings) for one in got] == [True, False, False]


def test_the_queues_own_track_is_that_of_requests_without_one(started, transcriber, spoken):
    tracks = [np.repeat(samples, 3) for samples, _ in spoken[:2]]
    film = with_av("matroska", "flac", *tracks, rate=48_000)
    queue = started(transcriber, Options(track=2, **FEW))
    durations = [finish(*submit(queue, io.BytesIO(film), track=track)).duration_s for track in (None, 1)]
    assert durations == pytest.approx([len(samples) / 48_000 for samples in tracks[::-1]], abs=0.01)
