"""Plans: repeatable, tight, and never a surprise later."""

import numpy as np
import pyarrow as pa
import pytest
from cache_stores import make_features, make_table
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import make_plan
from cache.errors import PlanError
from cache.layout import divide_shard
from cache.plan import plan_digest


def table(lengths: list[int], **columns: list[object]) -> pa.Table:
    made = make_table({f"u{i}": range(length) for i, length in enumerate(lengths)})
    for name, values in columns.items():
        made = made.append_column(name, [values])
    return made


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 1300), max_size=60),
    rows_per_shard=st.sampled_from([1024, 1025, 96, 4096]),
    margin=st.integers(0, 3),
)
def test_no_two_utterances_share_a_row_and_none_crosses_a_block(
    lengths: list[int], rows_per_shard: int, margin: int
) -> None:
    plan = make_plan(table(lengths), rows_per_shard=rows_per_shard, margin_frames=margin)
    assert sorted(plan["utterance_id"].to_pylist()) == sorted(f"u{i}" for i in range(len(lengths)))
    block_rows = divide_shard(rows_per_shard)[1]
    taken = set()
    for row in plan.to_pylist():
        if row["shard"] < 0:
            assert row["reason"] == ("no_frames" if row["num_frames"] < 1 else "longer_than_shard")
            continue
        rows = range(row["row"], row["row"] + row["num_frames"])
        assert rows.stop <= rows_per_shard
        assert row["num_frames"] > block_rows or rows.start // block_rows == (rows.stop - 1) // block_rows
        places = {(row["shard"], place) for place in rows}
        assert not places & taken
        taken |= places


@pytest.mark.parametrize(
    ("rows_per_shard", "expected"),
    [
        (131_072, (512, 16_384)),
        (16_384, (512, 16_384)),
        (4096, (512, 4096)),
        (1000, (500, 1000)),
        (97, (97, 97)),
        (1, (1, 1)),
        (1021, (1, 1021)),
    ],
)
def test_chunks_divide_blocks_and_blocks_divide_shards(rows_per_shard: int, expected: tuple[int, int]) -> None:
    chunk, block = divide_shard(rows_per_shard)
    assert (chunk, block) == expected
    assert rows_per_shard % block == 0
    assert block % chunk == 0


def test_speech_like_lengths_leave_one_percent_empty_at_most() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(350), 0.6, 20_000), 99, 1499).astype(int).tolist()
    plan = make_plan(table(lengths))
    rows = (max(plan["shard"].to_pylist())) * 131_072  # all but the last shard
    used = sum(row["num_frames"] for row in plan.to_pylist() if row["shard"] < rows // 131_072)
    assert used / rows >= 0.99


def test_a_shard_takes_neighbours_from_the_source() -> None:
    rng = np.random.default_rng(0)
    plan = make_plan(table(rng.integers(100, 1500, 5000).tolist()))
    for shard in range(max(plan["shard"].to_pylist())):
        rows = plan.filter(np.asarray(plan["shard"]) == shard)
        numbers = [int(name[1:]) for name in rows["utterance_id"].to_pylist()]
        assert numbers == sorted(numbers)
        assert numbers[-1] - numbers[0] < 2.2 * len(numbers)


def test_a_plan_depends_on_nothing_but_its_table() -> None:
    first = make_plan(make_table(make_features([30, 20, 50])), rows_per_shard=64)
    again = make_plan(make_table(make_features([30, 20, 50])), rows_per_shard=64)
    other = make_plan(make_table(make_features([30, 20, 51])), rows_per_shard=64)
    assert plan_digest(first) == plan_digest(again) != plan_digest(other)
    assert plan_digest(pa.concat_tables([first.slice(0, 1), first.slice(1)])) == plan_digest(first)


def test_the_callers_own_rejections_are_kept() -> None:
    plan = make_plan(table([10, 10, 10], reason=["", "no_text", None]), rows_per_shard=64)
    assert {row["utterance_id"]: (row["shard"], row["reason"]) for row in plan.to_pylist()} == {
        "u0": (0, ""),
        "u1": (-1, "no_text"),
        "u2": (0, ""),
    }


def test_a_table_that_cannot_be_planned_is_refused() -> None:
    with pytest.raises(PlanError, match="no column num_frames"):
        make_plan(table([10]).drop_columns(["num_frames"]))
    with pytest.raises(PlanError, match="'source_id' of the plan has 1 nulls"):
        make_plan(table([10]).set_column(2, "source_id", pa.array([None], pa.string())))
    with pytest.raises(PlanError, match="rows_per_shard is 0"):
        make_plan(table([10]), rows_per_shard=0)


def test_a_plan_with_a_duplicate_keeps_the_first() -> None:
    table = make_table(make_features([10, 20, 30]))
    table = table.set_column(0, "utterance_id", [["a", "b", "a"]])
    plan = make_plan(table, rows_per_shard=64)
    rejected = plan.filter(np.asarray(plan["shard"]) < 0).to_pylist()
    assert [(row["utterance_id"], row["num_frames"], row["reason"]) for row in rejected] == [("a", 30, "duplicate_id")]
