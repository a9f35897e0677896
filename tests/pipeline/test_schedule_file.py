from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch.distributed.pipelining.schedules import _Action

from megatron_lite.pipeline.instructions import COMPUTES, Instruction, Kind, ScheduleError
from megatron_lite.pipeline.schedule_file import write_schedule
from megatron_lite.pipeline.schedules import make_schedule
from tests.pipeline.simulation import check, computes

SHIPPED = [("1f1b", 1), ("interleaved", 3), ("zb-h1", 1), ("zb-v", 2), ("dualpipe-v", 2)]

# 1F1B on two ranks with one chunk each, 3 microbatches; columns aligned with empty cells as PyTorch writes them.
GOOD = """\
0F0,0F1,,0B0,0F2,0B1,,0B2
,1F0,1B0,1F1,1B1,1F2,1B2,
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own.csv"


@pytest.mark.parametrize(("name", "v"), SHIPPED)
def test_written_and_read_again(name: str, v: int, path: Path) -> None:
    schedule = make_schedule(name, 4, v, 9)
    write_schedule(schedule, path)
    again = make_schedule(str(path), 4, v, 9)
    assert (again.placement, again.lists) == (schedule.placement, schedule.lists)
    assert (again.name, again.num_microbatches) == (str(path), 9)


def test_pytorch_reads_what_is_written(path: Path) -> None:
    schedule = make_schedule("zb-v", 2, 2, 3)
    write_schedule(schedule, path)
    names = {
        "FORWARD": Kind.FORWARD,
        "FULL_BACKWARD": Kind.BACKWARD,
        "BACKWARD_INPUT": Kind.BACKWARD_INPUT,
        "BACKWARD_WEIGHT": Kind.BACKWARD_WEIGHT,
    }
    rows = [[_Action.from_str(cell) for cell in line.split(",")] for line in path.read_text().splitlines()]
    read = [
        [Instruction(names[a.computation_type.name], a.stage_index, a.microbatch_index) for a in row] for row in rows
    ]
    assert read == computes(schedule)


def test_a_file_of_ones_own(path: Path) -> None:
    path.write_text(GOOD)
    schedule = make_schedule(str(path), 2, 1, 3)
    check(schedule)
    assert schedule.lists == make_schedule("1f1b", 2, 1, 3).lists


def test_blank_lines_at_the_end_and_spaces(path: Path) -> None:
    path.write_text(GOOD.replace("0B0", " 0B0 ") + "\n,,\n")
    check(make_schedule(str(path), 2, 1, 3))


def test_overlapped_pairs_stand_one_after_the_other(path: Path) -> None:
    path.write_text(GOOD.replace("0F2,0B1", "(0F2;0B1)OVERLAP_F_B"))
    assert make_schedule(str(path), 2, 1, 3).lists == make_schedule("1f1b", 2, 1, 3).lists


def test_any_placement(path: Path) -> None:
    """Chunks 0 and 1 on rank 1, 2 and 3 on rank 0: no message between the chunks of a rank."""
    path.write_text("2F0,3F0,3B0,2B0\n0F0,1F0,1B0,0B0\n")
    schedule = make_schedule(str(path), 2, 2, 1)
    check(schedule)
    assert schedule.placement.rank_of == (1, 1, 0, 0)
    assert [len([i for i in rank if i.kind not in COMPUTES]) for rank in schedule.lists] == [3, 3]


def test_a_file_is_read_again_each_time(path: Path) -> None:
    path.write_text(GOOD)
    make_schedule(str(path), 2, 1, 3)
    path.write_text(GOOD.replace("1F1,1B1,1F2", "1F1,1F2,1B1"))
    assert make_schedule(str(path), 2, 1, 3).lists != make_schedule("1f1b", 2, 1, 3).lists


# what -> (changes to GOOD, what is said)
BAD = {
    "unknown letter": (("0B1", "0X1"), "line 1, cell 6: '0X1' is no instruction: write chunk, F (forward), B (backwa"),
    "a send": (("0F2", "0SEND_F2"), "line 1, cell 5: '0SEND_F2' is no instruction"),
    "no microbatch": (("1F2", "1F"), "line 2, cell 6: '1F' is no instruction"),
    "negative": (("1F2", "1F-2"), "line 2, cell 6: '1F-2' is no instruction"),
    "unknown pair": (("0F2,0B1", "(0F2;0Y1)OVERLAP_F_B"), "line 1, cell 5: '0Y1' is no instruction"),
    "forward missing": (
        ("0F1,", ","),
        "line 1, cell 5: 0F2 stands where the forward of microbatch 1 has to, which is ",
    ),
    "last forward missing": (("1F2", ""), "line 2, cell 7: 1B2 stands before the forward that it needs"),
    "backward missing": (("1B2", ""), "line 2: the input half of chunk 1, microbatch 2, is missing: add it"),
    "weight half missing": (("1B2", "1I2"), "line 2: the weight half of chunk 1, microbatch 2, is missing: add it"),
    "input half missing": (("1B2", "1W2"), "line 2, cell 7: 1W2 stands before the input half that it needs"),
    "forward repeated": (
        ("0B2", "0B2,0F1"),
        "line 1, cell 9: 0F1 repeats the forward of cell 2, 0F1: take one of them",
    ),
    "whole and half": (("0B1", "0B1,0W1"), "line 1, cell 7: 0W1 repeats the weight half of cell 6, 0B1"),
    "half and whole": (("0B1", "0I1,0B1"), "line 1, cell 7: 0B1 repeats the input half of cell 6, 0I1"),
    "forwards out of order": (("0F0,0F1", "0F1,0F0"), "line 1, cell 1: 0F1 stands before 0F0 of cell 2: a chunk takes"),
    "weights out of order": (
        ("0B0,0F2,0B1,,0B2", "0I0,0F2,0I1,0W1,0W0,0B2"),
        "line 1, cell 7: 0W1 stands before 0W0 of cell 8: a chunk takes its microbatches in order",
    ),
    "backward first": (("0F2,0B1,,0B2", "0B1,0B2,0F2"), "line 1, cell 6: 0B2 stands before the forward that it needs"),
    "chunk on two ranks": (
        ("1F0,", "0F0,"),
        "line 2, cell 2: 0F0 is of a chunk that rank 0 holds (line 1, cell 1: 0F0): leave each chunk on one line",
    ),
    "chunk too high": (
        ("1F2", "3F2"),
        "line 2, cell 6: 3F2 is of chunk 3, and 2 ranks with 1 virtual stages hold chunks 0 to 1: "
        "set parallel.virtual_stages=2, or number chunks from 0",
    ),
    "rank without work": ((",1F0,1B0,1F1,1B1,1F2,1B2,", ",,\n,,"), "1 lines, one a rank, for 2 pipeline ranks"),
    "one rank too many": (
        ("1B2,\n", "1B2,\n2F0\n"),
        "3 lines, one a rank, for 2 pipeline ranks: set parallel.pp=3, or",
    ),
    "microbatch too high": (
        ("0B2", "0B2,0F3"),
        "line 1, cell 9: 0F3 is of a microbatch past the last, 2: take it out, or set the batch so that a step has",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_said(what: str, path: Path) -> None:
    (old, new), said = BAD[what]
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ScheduleError, match=re.escape(said)) as error:
        make_schedule(str(path), 2, 1, 3)
    assert str(error.value).startswith(str(path))


def test_sizes_that_do_not_fit(path: Path) -> None:
    path.write_text(GOOD)
    with pytest.raises(
        ScheduleError, match="ends with microbatch 2, and a step has 5: set the batch so that a step has 3"
    ):
        make_schedule(str(path), 2, 1, 5)
    with pytest.raises(ScheduleError, match="line 1: chunks 0, where each rank has 2: give each rank as many chunks"):
        make_schedule(str(path), 2, 2, 3)
    write_schedule(make_schedule("zb-v", 2, 2, 3), path)
    with pytest.raises(ScheduleError, match=r"line 1, cell .*chunk 3, and 2 ranks .* set parallel\.virtual_stages=2"):
        make_schedule(str(path), 2, 1, 3)


def test_files_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"cannot be read as a schedule: .*No such file"):
        make_schedule(str(path), 2, 1, 3)
    path.write_bytes(b"\xff\xfe0F0")
    with pytest.raises(ScheduleError, match="cannot be read as a schedule"):
        make_schedule(str(path), 2, 1, 3)
    path.write_text("\n,,\n")
    with pytest.raises(ScheduleError, match="is empty: write one line a pipeline rank"):
        make_schedule(str(path), 2, 1, 3)


def test_ranks_that_wait_for_each_other(path: Path) -> None:
    """Each line is right by itself; rank 0 wants the gradient of microbatch 0 before it sends microbatch 1."""
    path.write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    with pytest.raises(
        ScheduleError, match="the order of computing never ends: rank 0 waits at backward of chunk 0, m"
    ):
        make_schedule(str(path), 2, 1, 2)
