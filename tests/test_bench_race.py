"""Contestants take turns; ratios are taken within a round; results are laid out with their notes."""

from pipelines.bench.race import median_ratio, race
from tinyaudio.cli.bench import format_results


def test_contestants_take_turns():
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert race(ways, 3) == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert order == list("ababab")


def test_a_slow_round_changes_no_ratio():
    assert median_ratio([10.0, 1.0, 10.0], [5.0, 0.5, 5.0]) == 2.0


def test_every_result_is_printed_with_its_note():
    results = {
        "padding": 0.01234,
        "device": "cpu",
        "worlds_agree": True,
        "matmul_share": None,
        "peak_bytes": 12_345_678,
        "skipped": [],
        "read_mb_s": {"store": 4995.7, "zarr": 490.0},
        "by_beams": {"1": {"ratio": 2.5, "shares": {"decode": 0.2}}, "4": {"ratio": 3.0, "shares": {"decode": 0.1}}},
    }
    assert (
        format_results(results, {"padding": "at most 0.02"})
        == """\
padding       0.012       at most 0.02
device                    cpu
worlds_agree  True
matmul_share  -
peak_bytes    12,345,678
skipped       -

read_mb_s  store  zarr
           4,996  490

by_beams  ratio  decode
1         2.500  0.200
4         3.000  0.100"""
    )
