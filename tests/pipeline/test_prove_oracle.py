"""The prover against an oracle that knows nothing of it: all interleavings of small programs, one step at a time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from megatron_lite.pipeline.instructions import ScheduleError
from megatron_lite.pipeline.prove_programs import (
    Collective,
    Compute,
    Operation,
    Program,
    Receive,
    Semantics,
    Send,
    prove_programs,
)

MOST_OPERATIONS = 8

# (where each rank stands, what is under way on each line or channel, what has arrived at each rank)
Underway = tuple[tuple[tuple[object, ...], tuple[Operation, ...]], ...]
State = tuple[tuple[int, ...], Underway, frozenset[tuple[int, int]]]


class Wrong(Exception):
    """Two ends met that do not belong together."""


def line_of(operation: Send | Receive, semantics: Semantics) -> str:
    return "" if semantics is Semantics.ONE_STREAM else operation.stream


def next_states(programs: list[Program], semantics: Semantics, state: State) -> Iterator[State]:
    """Every state that one step of one rank, one message or one collective leads to."""
    places, underway_items, arrived = state
    underway = dict(underway_items)

    def moved(*ranks: int) -> tuple[int, ...]:
        return tuple(place + (rank in ranks) for rank, place in enumerate(places))

    def packed(changes: dict[tuple[object, ...], tuple[Operation, ...]]) -> Underway:
        return tuple(sorted(((k, v) for k, v in {**underway, **changes}.items() if v), key=str))

    def got(rank: int, tensor: int) -> frozenset[tuple[int, int]]:
        if (rank, tensor) in arrived:
            raise Wrong("received twice")
        return arrived | {(rank, tensor)}

    def at(rank: int) -> Operation | None:
        return programs[rank][places[rank]] if places[rank] < len(programs[rank]) else None

    for rank in range(len(programs)):
        operation = at(rank)
        if isinstance(operation, Compute):
            if all((rank, tensor) in arrived for tensor in operation.uses):
                # Taken out under the name of a rank that is not there, so that a second use or receive is seen.
                if any((~rank, tensor) in arrived for tensor in operation.uses):
                    raise Wrong("used twice")
                yield moved(rank), underway_items, arrived | {(~rank, tensor) for tensor in operation.uses}
        elif isinstance(operation, Collective):
            others = [at(member) for member in operation.ranks]
            if rank not in operation.ranks:
                raise Wrong("not a member")
            if all(
                isinstance(o, Collective) and (o.axis, o.ranks) == (operation.axis, operation.ranks) for o in others
            ):
                if len({o.what for o in others}) > 1:
                    raise Wrong("different collectives")
                yield moved(*operation.ranks), underway_items, arrived
        elif operation is None:
            pass
        elif semantics is Semantics.BUFFERED:
            ends = (rank, operation.peer) if isinstance(operation, Send) else (operation.peer, rank)
            key = (*ends, operation.stream)
            if isinstance(operation, Send):
                yield moved(rank), packed({key: (*underway.get(key, ()), operation)}), arrived
            elif underway.get(key):
                if underway[key][0].tensor != operation.tensor:
                    raise Wrong("another tensor")
                yield moved(rank), packed({key: underway[key][1:]}), got(rank, operation.tensor)
        elif semantics is Semantics.RENDEZVOUS:
            other = at(operation.peer)
            if (
                isinstance(operation, Send)
                and isinstance(other, Receive)
                and (other.peer, other.stream) == (rank, operation.stream)
            ):
                if other.tensor != operation.tensor:
                    raise Wrong("another tensor")
                yield moved(rank, operation.peer), underway_items, got(operation.peer, other.tensor)
        else:
            key = (rank, line_of(operation, semantics))
            yield moved(rank), packed({key: (*underway.get(key, ()), operation)}), arrived
    if semantics in (Semantics.ONE_STREAM, Semantics.TWO_STREAMS):
        for key, line in underway.items():
            rank, stream = key
            other_line = underway.get((line[0].peer, stream), ())
            if isinstance(line[0], Send) and other_line and isinstance(other_line[0], Receive):
                if other_line[0].peer != rank:
                    continue
                if other_line[0].tensor != line[0].tensor:
                    raise Wrong("another tensor")
                left = packed({key: line[1:], (line[0].peer, stream): other_line[1:]})
                yield places, left, got(line[0].peer, line[0].tensor)


def always_ends(programs: list[Program], semantics: Semantics) -> bool:
    """Whether no interleaving stops early, leaves a message behind, or lets two wrong ends meet."""
    start: State = ((0,) * len(programs), (), frozenset())
    seen, stack = {start}, [start]
    while stack:
        state = stack.pop()
        try:
            after = list(next_states(programs, semantics, state))
        except Wrong:
            return False
        if not after and (state[1] or any(p < len(q) for p, q in zip(state[0], programs, strict=True))):
            return False
        for one in after:
            if one not in seen:
                seen.add(one)
                stack.append(one)
    return True


def is_proven(programs: list[Program], semantics: Semantics) -> bool:
    try:
        prove_programs(programs, [semantics])
    except ScheduleError:
        return False
    return True


def random_programs(draw: random.Random) -> list[list[Operation]]:
    """A run in one order, cut into the programs of its ranks, which a few changes then spoil, or not."""
    num_ranks = draw.choice((2, 3))
    programs: list[list[Operation]] = [[] for _ in range(num_ranks)]
    to_use: list[tuple[int, int]] = []
    for tensor in range(draw.randint(1, 8)):
        chosen = draw.random()
        if chosen < 0.7:
            sender, receiver = draw.sample(range(num_ranks), 2)
            stream = draw.choice(("activation", "gradient"))
            programs[sender].append(Send(f"send {tensor}", receiver, tensor, stream))
            programs[receiver].append(Receive(f"receive {tensor}", sender, tensor, stream))
            to_use.append((receiver, tensor))
        elif chosen < 0.85:
            members = tuple(sorted(draw.sample(range(num_ranks), draw.randint(1, num_ranks))))
            axis = draw.choice(("tp", "dp"))
            for member in members:
                programs[member].append(Collective(f"meet {draw.choice('aaaaaab')}", members, axis))
        elif to_use:
            rank, used = to_use.pop(draw.randrange(len(to_use)))
            programs[rank].append(Compute(f"use {used}", (used,)))
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        program = draw.choice([program for program in programs if program] or [[]])
        if not program:
            break
        i, j = draw.randrange(len(program)), draw.randrange(len(program))
        how = draw.random()
        if how < 0.7:
            program[i], program[j] = program[j], program[i]
        elif how < 0.8:
            program.insert(j, program[i])
        elif how < 0.9 and len(program) > 1:
            del program[i]
        elif not isinstance(program[i], Compute):
            moved = program.pop(i)
            draw.choice(programs).append(moved)
    return [program[:MOST_OPERATIONS] for program in programs]


@pytest.mark.parametrize("seed", range(8))
def test_the_verdict_is_that_of_all_interleavings(seed: int) -> None:
    draw = random.Random(seed)
    verdicts: Counter[tuple[Semantics, bool]] = Counter()
    for _ in range(500):
        programs = random_programs(draw)
        for semantics in Semantics:
            expected = always_ends(programs, semantics)
            assert is_proven(programs, semantics) == expected, (semantics, programs)
            verdicts[semantics, expected] += 1
    assert min(verdicts[semantics, end] for semantics in Semantics for end in (True, False)) > 50, verdicts


@pytest.mark.parametrize("seed", range(4))
def test_what_ends_with_rendezvous_ends_with_every_semantics(seed: int) -> None:
    """Why a world of replicas is proven under rendezvous only. The reverse does not hold."""
    draw = random.Random(100 + seed)
    only_looser = 0
    for _ in range(1000):
        programs = random_programs(draw)
        looser = [is_proven(programs, one) for one in Semantics if one is not Semantics.RENDEZVOUS]
        if is_proven(programs, Semantics.RENDEZVOUS):
            assert all(looser), programs
        else:
            only_looser += any(looser)
    assert only_looser > 50
