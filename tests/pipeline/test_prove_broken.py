"""What the prover says of schedules that are wrong: a catalogue, each with its exact diagnosis."""

from __future__ import annotations

import re

import pytest

from megatron_lite.pipeline.instructions import Instruction, Kind, Schedule, ScheduleError, loop
from megatron_lite.pipeline.prove import prove, prove_world
from megatron_lite.pipeline.prove_programs import Collective, Compute, Receive, Semantics, Send, prove_programs

# The notation of PyTorch's schedules: chunk, kind, microbatch.
KINDS = {
    "F": Kind.FORWARD,
    "B": Kind.BACKWARD,
    "I": Kind.BACKWARD_INPUT,
    "W": Kind.BACKWARD_WEIGHT,
    "SEND_F": Kind.SEND_ACTIVATION,
    "RECV_F": Kind.RECEIVE_ACTIVATION,
    "SEND_B": Kind.SEND_GRADIENT,
    "RECV_B": Kind.RECEIVE_GRADIENT,
}


def instruction(word: str) -> Instruction:
    if word == "REDUCE":
        return Instruction(Kind.REDUCE_GRADIENTS)
    chunk, kind, microbatch = re.fullmatch(r"(\d+)([A-Z_]+)(\d+)", word).groups()  # type: ignore[union-attr]
    return Instruction(KINDS[kind], int(chunk), int(microbatch))


def schedule(*lists: str, virtual_stages: int = 1, microbatches: int = 3) -> Schedule:
    placement = loop(len(lists), virtual_stages)
    return Schedule("by hand", placement, microbatches, tuple([*map(instruction, one.split())] for one in lists))


RANK_0 = "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0F2 0SEND_F2 0RECV_B1 0B1 0RECV_B2 0B2 REDUCE"
RANK_1 = "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1RECV_F2 1SEND_B1 1F2 1B2 1SEND_B2 REDUCE"
HALVES = "1RECV_F0 1F0 1RECV_F1 1I0 1SEND_B0 1W0 1F1 1I1 1W1 1RECV_F2 1SEND_B1 1F2 1I2 1W2 1SEND_B2 REDUCE"

BROKEN = {
    "swapped send and receive": (
        ("0SEND_F1 0RECV_B0", "0RECV_B0 0SEND_F1"),
        "ranks wait for each other, with buffered sends: "
        'rank 0 waits at "receive gradient of chunk 0, microbatch 0" for rank 1, which '
        'waits at "receive activation of chunk 1, microbatch 1" for rank 0',
    ),
    "missing receive": (("1RECV_F1 ", ""), 'rank 1: "receive activation of chunk 1, microbatch 1" is missing'),
    "missing send": (("0SEND_F1 ", ""), 'rank 0: "send activation of chunk 0, microbatch 1" is missing'),
    "missing forward": (("0F2 ", ""), 'rank 0: "forward of chunk 0, microbatch 2" is missing'),
    "missing backward": (("1B2 ", ""), 'rank 1: "backward of chunk 1, microbatch 2" is missing'),
    "missing half": (("1W2 ", ""), 'rank 1: "backward for the weights of chunk 1, microbatch 2" is missing'),
    "missing reduction": (("0B2 REDUCE", "0B2"), 'rank 0: "reduce gradients" is missing'),
    "repeated receive": (
        ("1RECV_F1", "1RECV_F1 1RECV_F1"),
        'rank 1: "receive activation of chunk 1, microbatch 1" stands there twice',
    ),
    "repeated reduction": (("0B2 REDUCE", "0B2 REDUCE REDUCE"), 'rank 0: "reduce gradients" stands there twice'),
    "double use": (("1F1 1B1", "1F1 1F1 1B1"), 'rank 1: "forward of chunk 1, microbatch 1" stands there twice'),
    "double use by a half": (
        ("1B1", "1B1 1W1"),
        'rank 1: "backward for the weights of chunk 1, microbatch 1" does again what '
        '"backward of chunk 1, microbatch 1" has done',
    ),
    "order between a pair": (
        ("1RECV_F0 1F0 1RECV_F1 ", "1RECV_F1 1RECV_F0 1F0 "),
        'message 0 from rank 0 to rank 1 is "send activation of chunk 0, microbatch 0" at one end and "receive '
        'activation of chunk 1, microbatch 1" at the other',
    ),
    "use before its receive": (
        ("1RECV_F0 1F0", "1F0 1RECV_F0"),
        'rank 1: "forward of chunk 1, microbatch 0" stands before "receive activation of chunk 1, microbatch 0"',
    ),
    "send before it is made": (
        ("0F1 0SEND_F1", "0SEND_F1 0F1"),
        'rank 0: "send activation of chunk 0, microbatch 1" stands before "forward of chunk 0, microbatch 1"',
    ),
    "backward before its forward": (
        ("1F1 1B1", "1B1 1F1"),
        'rank 1: "backward of chunk 1, microbatch 1" stands before "forward of chunk 1, microbatch 1"',
    ),
    "weight half before input half": (
        ("1I1 1W1", "1W1 1I1"),
        'rank 1: "backward for the weights of chunk 1, microbatch 1" stands before '
        '"backward for the input of chunk 1, microbatch 1"',
    ),
    "reduction too early": (
        ("0RECV_B2 0B2 REDUCE", "0RECV_B2 REDUCE 0B2"),
        'rank 0: "reduce gradients" stands before "backward of chunk 0, microbatch 2"',
    ),
    "weight half after the reduction": (
        ("1W2 1SEND_B2 REDUCE", "1SEND_B2 REDUCE 1W2"),
        'rank 1: "reduce gradients" stands before "backward for the weights of chunk 1, microbatch 2"',
    ),
    "microbatches out of order": (
        ("0F0 0SEND_F0 0F1 0SEND_F1", "0F1 0SEND_F1 0F0 0SEND_F0"),
        'rank 0: "forward of chunk 0, microbatch 1" stands before "forward of chunk 0, microbatch 0": the sums of '
        "gradients would have other bits than without a pipeline",
    ),
    "gradients of weights out of order": (
        ("1W0 1F1 1I1 1W1", "1F1 1I1 1W1 1W0"),
        'rank 1: "backward for the weights of chunk 1, microbatch 1" stands before "backward for the weights of chunk '
        '1, microbatch 0": the sums of gradients would have other bits than without a pipeline',
    ),
    "another rank's chunk": (
        ("0F2", "0F2 1F2"),
        'rank 0: "forward of chunk 1, microbatch 2" cannot run there: chunk 1 is on rank 1',
    ),
    "no such chunk": (
        ("0F2", "0F2 7F2"),
        'rank 0: "forward of chunk 7, microbatch 2" cannot run there: chunk 7 is on no rank',
    ),
    "no such microbatch": (
        ("0F2", "0F2 0F3"),
        'rank 0: "forward of chunk 0, microbatch 3": the step has microbatches 0 to 2',
    ),
    "a message to nobody": (
        ("1F2", "1F2 1SEND_F2"),
        'rank 1: "send activation of chunk 1, microbatch 2" has no place in this schedule',
    ),
}


@pytest.mark.parametrize("second", [RANK_1, HALVES])
def test_the_lists_are_right_before_they_are_spoilt(second: str) -> None:
    assert prove(schedule(RANK_0, second)).peak_activations == (2, 1)


@pytest.mark.parametrize("name", BROKEN)
def test_diagnosis(name: str) -> None:
    (old, new), diagnosis = BROKEN[name]
    second = HALVES if old not in RANK_0 + RANK_1 else RANK_1
    assert (RANK_0 + second).count(old) == 1
    with pytest.raises(ScheduleError) as error:
        prove(schedule(RANK_0.replace(old, new), second.replace(old, new)))
    assert str(error.value) == diagnosis


def test_a_list_too_few() -> None:
    whole = schedule(RANK_0, RANK_1)
    with pytest.raises(ScheduleError, match=r"^1 lists of instructions for 2 ranks$"):
        prove(Schedule("by hand", whole.placement, 3, whole.lists[:1]))


# The two orders that were reported to hang: https://github.com/pytorch/pytorch/issues/172668
SENDS_ON_BOTH_SIDES = schedule(
    "0F0 0SEND_F0 0F1 0SEND_F1 2RECV_F0 2F0 2SEND_F0 2RECV_F1 2F1 2SEND_F1 2RECV_B0 2B0 2SEND_B0 2RECV_B1 2B1 2SEND_B1 "
    "0RECV_B0 0B0 0RECV_B1 0B1 REDUCE",
    "1RECV_F0 1F0 1SEND_F0 1RECV_F1 1F1 1SEND_F1 3RECV_F0 3F0 3RECV_F1 3F1 3B0 3SEND_B0 3B1 3SEND_B1 1RECV_B0 1B0 "
    "1SEND_B0 1RECV_B1 1B1 1SEND_B1 REDUCE",
    virtual_stages=2,
    microbatches=2,
)
AFTER_THE_ODD_RANK_HAS_SWAPPED = schedule(
    "0F0 0SEND_F0 0F1 0SEND_F1 2RECV_F0 2F0 2SEND_F0 2RECV_F1 2F1 2SEND_F1 0F2 0SEND_F2 2RECV_B0 2B0 2RECV_B1 2SEND_B0 "
    "2B1 2SEND_B1 2RECV_F2 2F2 2SEND_F2 2RECV_B2 2B2 2SEND_B2 0RECV_B0 0B0 0RECV_B1 0B1 0RECV_B2 0B2 REDUCE",
    "1RECV_F0 1F0 1RECV_F1 1SEND_F0 1F1 3RECV_F0 1SEND_F1 3F0 3B0 3RECV_F1 3SEND_B0 3F1 3B1 1RECV_F2 3SEND_B1 1F2 "
    "1RECV_B0 1RECV_B1 1SEND_F2 3RECV_F2 3F2 3B2 3SEND_B2 1RECV_B2 1B0 1SEND_B0 1B1 1SEND_B1 1B2 1SEND_B2 REDUCE",
    virtual_stages=2,
    microbatches=3,
)


def diagnosis_of(one: Schedule, semantics: Semantics) -> str:
    with pytest.raises(ScheduleError) as error:
        prove_world([[one]], [semantics])
    return str(error.value)


def test_both_send_before_they_receive() -> None:
    prove_world([[SENDS_ON_BOTH_SIDES]], [Semantics.BUFFERED])
    assert diagnosis_of(SENDS_ON_BOTH_SIDES, Semantics.RENDEZVOUS) == (
        "ranks wait for each other, with rendezvous: "
        'rank 0 waits at "send activation of chunk 0, microbatch 1" for rank 1, which '
        'waits at "send activation of chunk 1, microbatch 0" for rank 0'
    )
    assert diagnosis_of(SENDS_ON_BOTH_SIDES, Semantics.TWO_STREAMS) == (
        "ranks wait for each other, with transfers in one ordered stream for each direction: "
        'the activation stream of rank 0 waits at "send activation of chunk 0, microbatch 1" for '
        'the activation stream of rank 1, which waits at "send activation of chunk 1, microbatch 0" for '
        "the activation stream of rank 0"
    )


def test_an_activation_and_a_gradient_that_cross() -> None:
    """Two streams carry them past each other; one does not."""
    prove_world([[AFTER_THE_ODD_RANK_HAS_SWAPPED]], [Semantics.BUFFERED, Semantics.TWO_STREAMS])
    assert diagnosis_of(AFTER_THE_ODD_RANK_HAS_SWAPPED, Semantics.RENDEZVOUS) == (
        "ranks wait for each other, with rendezvous: "
        'rank 0 waits at "send activation of chunk 0, microbatch 2" for rank 1, which '
        'waits at "send gradient of chunk 3, microbatch 0" for rank 0'
    )
    assert diagnosis_of(AFTER_THE_ODD_RANK_HAS_SWAPPED, Semantics.ONE_STREAM) == (
        "ranks wait for each other, with transfers in one ordered stream for each rank: "
        'the stream of rank 0 waits at "send activation of chunk 0, microbatch 2" for '
        'the stream of rank 1, which waits at "send gradient of chunk 3, microbatch 0" for the stream of rank 0'
    )


def test_a_tp_rank_that_runs_another_list() -> None:
    one = schedule("0F0 0F1 0B0 0B1 REDUCE", microbatches=2)
    other = schedule("0F0 0B0 0F1 0B1 REDUCE", microbatches=2)
    prove_world([[one, one], [other, other]], tuple(Semantics))  # over dp they may differ
    with pytest.raises(ScheduleError) as error:
        prove_world([[one, other]], tuple(Semantics))
    assert str(error.value) == (
        'collective 1 over tp is "forward of chunk 0, microbatch 1" on rank 0 (dp 0, tp 0), '
        '"backward of chunk 0, microbatch 0" on rank 0 (dp 0, tp 1)'
    )
    with pytest.raises(ScheduleError, match=r"^replicas of one pipeline must place its chunks alike$"):
        prove_world([[one, schedule(RANK_0, RANK_1)]], tuple(Semantics))


# Below: programs that no schedule makes.


def why_not(*programs: list[Send | Receive | Compute | Collective], semantics: Semantics) -> str:
    with pytest.raises(ScheduleError) as error:
        prove_programs(programs, [semantics])
    return str(error.value)


def test_two_streams_in_opposite_order() -> None:
    first = [Send("x out", 1, 0, "activation"), Send("y out", 1, 1, "gradient")]
    second = [Receive("y in", 0, 1, "gradient"), Receive("x in", 0, 0, "activation")]
    prove_programs([first, second], [Semantics.BUFFERED, Semantics.TWO_STREAMS])
    assert why_not(first, second, semantics=Semantics.ONE_STREAM) == (
        'message 0 from rank 0 to rank 1 is "x out" at one end and "y in" at the other, with transfers in one ordered '
        "stream for each rank"
    )
    assert why_not(first, second, semantics=Semantics.RENDEZVOUS) == (
        "ranks wait for each other, with rendezvous: "
        'rank 0 waits at "x out" for rank 1, which waits at "y in" for rank 0'
    )


def test_computing_that_stands_in_front_of_what_it_waits_for() -> None:
    """Rank 0 computes with y before it comes to x, and rank 1 makes y of x: streams do not help."""
    first = [Receive("y in", 1, 1, "b"), Compute("use y", (1,)), Send("x out", 1, 0, "a")]
    second = [Receive("x in", 0, 0, "a"), Compute("use x", (0,)), Send("y out", 0, 1, "b")]
    assert why_not(first, second, semantics=Semantics.TWO_STREAMS) == (
        "ranks wait for each other, with transfers in one ordered stream for each direction: "
        'rank 0 waits at "use y" for the b stream of rank 0, which waits at "y in" for rank 1, which '
        'waits at "use x" for the a stream of rank 1, which waits at "x in" for rank 0'
    )


def test_three_ranks_in_a_ring() -> None:
    ring = [
        [Send(f"out {r}", (r + 1) % 3, r, "a"), Receive(f"in {r}", (r + 2) % 3, (r + 2) % 3, "a")] for r in range(3)
    ]
    prove_programs(ring, [Semantics.BUFFERED])
    assert why_not(*ring, semantics=Semantics.RENDEZVOUS) == (
        'ranks wait for each other, with rendezvous: rank 0 waits at "out 0" for rank 1, which waits at "out 1" for '
        'rank 2, which waits at "out 2" for rank 0'
    )


def test_collectives_of_two_groups_in_opposite_order() -> None:
    one, other = Collective("gather", (0, 1), "tp"), Collective("reduce", (0, 1), "dp")
    for semantics in Semantics:
        prove_programs([[one, other], [one, other]], [semantics])
        assert why_not([one, other], [other, one], semantics=semantics) == (
            f"ranks wait for each other, with {semantics.value}: "
            'rank 0 waits at "gather" for rank 1, which waits at "reduce" for rank 0'
        )


def test_a_collective_in_front_of_a_message_and_behind_it() -> None:
    meet = Collective("gather", (0, 1), "tp")
    first, second = [Send("x out", 1, 0, "a"), meet], [meet, Receive("x in", 0, 0, "a")]
    prove_programs([first, second], [Semantics.BUFFERED, Semantics.ONE_STREAM])
    assert why_not(first, second, semantics=Semantics.RENDEZVOUS) == (
        "ranks wait for each other, with rendezvous: "
        'rank 0 waits at "x out" for rank 1, which waits at "gather" for rank 0'
    )


@pytest.mark.parametrize("semantics", Semantics)
def test_ends_that_are_not_there(semantics: Semantics) -> None:
    send, receive, meet = Send("x out", 1, 0, "a"), Receive("x in", 0, 0, "a"), Collective("gather", (0, 1), "tp")
    assert why_not([send], [], semantics=semantics) == 'rank 0 comes to "x out", which rank 1 does not receive'
    assert why_not([], [receive], semantics=semantics) == 'rank 1 waits at "x in", which rank 0 does not send'
    assert why_not([send, send], [receive, receive], semantics=semantics) == 'rank 1: "x in" stands there twice'
    assert why_not([meet], [], semantics=semantics) == 'collective 0 over tp is "gather" on rank 0, missing on rank 1'
    assert why_not([meet], [meet], [meet], semantics=semantics) == (
        'rank 2 comes to "gather" over tp, in a group that lacks it'
    )
    use = Compute("use x", (0,))
    assert why_not([send], [use, receive], semantics=semantics) == (
        'rank 1: "use x" stands before the receive of what it uses'
    )
    assert why_not([send], [receive, use, use], semantics=semantics) == 'rank 1: "use x" uses what has been used before'


@pytest.mark.parametrize("semantics", [Semantics.ONE_STREAM, Semantics.TWO_STREAMS, Semantics.RENDEZVOUS])
def test_a_message_of_a_rank_to_itself(semantics: Semantics) -> None:
    diagnosis = why_not([Send("out", 0, 0, "a"), Receive("in", 0, 0, "a")], semantics=semantics)
    assert 'waits at "out" for' in diagnosis and diagnosis.endswith("rank 0")
