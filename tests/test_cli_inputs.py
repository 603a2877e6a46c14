"""Which files of a folder are transcribed, what is said about the others, and what happens when a text has no place."""

import pytest
from audio_files import speech, with_av, with_soundfile
from test_cli_transcribe import run_transcribe  # noqa: F401 (a fixture)

from tinyaudio.cli import transcribe as command
from tinyaudio.cli.inputs import EXTENSIONS, find_inputs


def test_films_and_rare_formats_in_a_folder_are_found_and_read(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    film = {"film_s": 1.0, "rate": 44_100}
    sound = speech(1.0, 44_100)
    files = {
        "a.3gp": with_av("3gp", "aac", sound, **film),
        "b.m4v": with_av("mp4", "aac", sound, **film),
        "c.AVI": with_av("avi", "mp3", sound, **film),
        "d.ts": with_av("mpegts", "aac", sound, **film),
        "e.flv": with_av("flv", "aac", sound, rate=44_100),
        "f.mpg": with_av("mpeg", "mp2", sound, rate=44_100),
        "g.ac3": with_av("ac3", "ac3", sound, rate=44_100),
        "h.w64": with_soundfile(sound, 44_100, "W64"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    done = run(folder, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert len(list((tmp_path / "out").iterdir())) == len(files)


@pytest.mark.parametrize("extension", "3g2 m2ts mts ogv wmv vob spx wv tta ape m4b dts".split())
def test_extension_is_known(extension):
    assert extension in EXTENSIONS


def test_files_of_macos_are_passed_over_in_silence_unless_named(run, tmp_path, talk):
    folder = talk.parent
    (folder / "._talk.wav").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    (folder / "._talk.mp3").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    done = run(folder, "-o", tmp_path / "out")
    assert done.exit_code == 0
    assert "passed over" not in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["talk.txt"]
    assert run(folder / "._talk.wav").exit_code == 1


def test_files_of_unknown_kind_are_counted_in_a_note(tmp_path):
    for name in ("a.wav", "b.xyz", "c.xyz", "noextension", "a.txt", "cover.jpg", "notes.md", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/d.foo").write_bytes(b"x")
    (found,) = find_inputs([str(tmp_path)], recursive=False)
    assert found.note == (
        f"{str(tmp_path)!r}: passed over 3 files of unknown kind (.xyz, no extension). Name a file on the command line "
        "to try it"
    )
    (found,) = find_inputs([str(tmp_path)], recursive=True)
    assert "4 files of unknown kind (.foo, .xyz, no extension)" in found.note
    (tmp_path / "a.wav").unlink()
    (empty,) = find_inputs([str(tmp_path)], recursive=False)
    assert empty.problem
    assert "3 files" in empty.note
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.wav").write_bytes(b"x")
    assert [item.note for item in find_inputs([str(tmp_path / "other")], recursive=False)] == [None]


def test_text_that_cannot_be_written_is_printed(run, talk, tmp_path, monkeypatch):
    """A folder on a read-only disk; decoding it again may take hours."""

    def read_only(path, text):
        raise OSError(30, "Read-only file system")

    expected = run(talk).stdout.strip()
    assert expected
    monkeypatch.setattr(command, "write_text", read_only)
    for words in ((talk.parent,), (talk, "-f", "srt"), (talk, "-o", tmp_path / "out", "-f", "json,vtt")):
        done = run(*words)
        assert done.exit_code == 1
        assert "Read-only file system" in done.stderr
        assert done.stdout.strip().endswith(f": {expected}")
        assert done.stdout.count(expected) == 1


def test_track_is_an_option_of_the_command_line(run, tmp_path):
    path = tmp_path / "x.mkv"
    path.write_bytes(with_av("matroska", "flac", speech(1.0, 48_000), speech(1.0, 48_000, seed=1)))
    assert "several_tracks" in run(path).stderr
    second = run(path, "--track", "2")
    assert second.exit_code == 0
    assert "several_tracks" not in second.stderr
    third = run(path, "--track", "3")
    assert third.exit_code == 1
    assert "Try --track 1 to 2" in third.stderr
    assert run(path, "--track", "0").exit_code == 2
