"""Programs of ranks that send, receive and meet in collectives: do they end?

A program is a list of operations, one list a rank, of any set of ranks. The lists are straight-line and the k-th send
of a channel (sender, receiver, stream) meets its k-th receive, so who meets whom is known before anything runs. What
a semantics of messages adds is which operations of a rank wait in line behind each other: its *lanes*. Each lane is a
row of events; an event happens once all lanes that take part have come to it, and a lane stands at it until then, or,
where it only announces (a buffered send), goes on at once. What has become possible stays possible, so the order in
which events are tried cannot change how far the lanes come (Kahn 1974, determinate networks): one run decides, and
where it stops, lanes wait for each other in a cycle.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from enum import Enum
from itertools import zip_longest
from typing import NamedTuple

from megatron_lite.pipeline.instructions import ScheduleError


class Compute(NamedTuple):
    """Uses tensors that the rank receives. ``what``, here and below: what a diagnosis calls the operation."""

    what: object
    uses: tuple[int, ...]


class Send(NamedTuple):
    """``tensor`` to the rank ``peer``, in the line of ``stream`` where transfers stand in lines."""

    what: object
    peer: int
    tensor: int
    stream: str


class Receive(NamedTuple):
    """``tensor`` from the rank ``peer``."""

    what: object
    peer: int
    tensor: int
    stream: str


class Collective(NamedTuple):
    """All of ``ranks`` come to it before any goes on, each with an equal ``what``, in the group named ``axis``."""

    what: object
    ranks: tuple[int, ...]
    axis: str


Operation = Compute | Send | Receive | Collective
Program = Sequence[Operation]


class Semantics(Enum):
    """When a message lets its ranks go on; the value is what a diagnosis says.

    RENDEZVOUS is the strictest: a run of it puts all operations into one order that every rank keeps, and in that
    order the other three run as well. They are there because each finds, and names, another kind of mistake.
    """

    BUFFERED = "buffered sends"  # a send ends at once; a receive waits for it
    TWO_STREAMS = "transfers in one ordered stream for each direction"  # see _Meetings._streams
    ONE_STREAM = "transfers in one ordered stream for each rank"
    RENDEZVOUS = "rendezvous"  # a send waits until its receive is reached, and a receive until its send is


_NOTHING = 0  # an event that nobody waits at
_USED = -1
Group = tuple[str, tuple[int, ...]]


def prove_programs(
    programs: Sequence[Program], semantics: Sequence[Semantics] = tuple(Semantics), *, names: Sequence[str] = ()
) -> None:
    """Shows that the programs end, under each semantics, and that every send and its receive are of one tensor.

    programs: ``programs[rank]``. names: what a diagnosis calls the ranks ("rank 0").
    Raises ScheduleError: a send without its receive, and the reverse; ends that differ in the tensor, or in what a
    collective is; a tensor that is received or used twice, or used before its receive; or ranks that wait for each
    other, with the whole cycle.
    """
    names = names or [f"rank {rank}" for rank in range(len(programs))]
    _check_collectives(programs, names)
    meetings = _Meetings(programs, names)
    for one in semantics:
        lanes, missing = meetings.lanes(one)
        _run(lanes, missing)
        if any(lane.position < len(lane.events) for lane in lanes):
            raise ScheduleError(f"ranks wait for each other, with {one.value}: {_cycle(lanes)}")


def _check_collectives(programs: Sequence[Program], names: Sequence[str]) -> None:
    """Every rank of a group comes to the same collectives of it, in the same order."""
    groups: dict[Group, dict[int, list[object]]] = defaultdict(lambda: defaultdict(list))
    for rank, program in enumerate(programs):
        for operation in program:
            if isinstance(operation, Collective):
                groups[operation.axis, operation.ranks][rank].append(operation.what)
    for (axis, ranks), found in groups.items():
        for rank in found:
            if rank not in ranks:
                raise ScheduleError(f'{names[rank]} comes to "{found[rank][0]}" over {axis}, in a group that lacks it')
        first = found[ranks[0]]
        for rank in ranks[1:]:
            if found[rank] != first:
                pairs = enumerate(zip_longest(first, found[rank]))
                k, pair = next((k, pair) for k, pair in pairs if pair[0] != pair[1])
                one, other = ("missing" if what is None else f'"{what}"' for what in pair)
                raise ScheduleError(
                    f"collective {k} over {axis} is {one} on {names[ranks[0]]}, {other} on {names[rank]}"
                )


class _Lane:
    """A row of events. One that the lane announces, and does not wait at, stands there as ``~event``."""

    def __init__(self, name: str, events: list[int], operations: list[Operation]) -> None:
        self.name, self.events = name, events
        self.operations = operations  # to each event, for a diagnosis
        self.position = 0

    def add(self, event: int, operation: Operation) -> None:
        self.events.append(event)
        self.operations.append(operation)


class _Channel:
    """What one rank sends another: an event for each k, made by the end that comes to its k-th first."""

    def __init__(self) -> None:
        self.events: list[int] = []
        self.sends: list[int] = []  # tensors
        self.receives: list[int] = []


class _Meetings:
    """The programs of a world, with a number for each meeting: of a send and its receive, or of a group."""

    def __init__(self, programs: Sequence[Program], names: Sequence[str]) -> None:
        self._programs, self._names = programs, names
        self._comers = [sys.maxsize]  # to each event: how many ranks meet in a group; 0 for a send and its receive
        self._channels: dict[tuple[int, int, str], _Channel] = defaultdict(_Channel)
        self._groups: dict[Group, list[int]] = defaultdict(list)
        self._uses: list[list[list[int]]] = [[] for _ in programs]  # each Compute's events, of receives
        self._events = [self._number(rank, program) for rank, program in enumerate(programs)]
        for (sender, receiver, stream), channel in self._channels.items():
            if channel.sends != channel.receives:
                raise self._unmatched(sender, receiver, (stream,))

    def _number(self, rank: int, program: Program) -> list[int]:
        """The event of each operation, ``~_NOTHING`` for a Compute."""
        comers, groups = self._comers, self._groups
        row: list[int] = []
        ends: dict[
            tuple[bool, int, str], tuple[list[int], list[int]]
        ] = {}  # a channel's events, and this end's tensors
        arrivals: dict[int, int] = {}  # tensor -> the event of its receive, or _USED
        met: Counter[Group] = Counter()
        for operation in program:
            if isinstance(operation, (Send, Receive)):
                _, peer, tensor, stream = operation
                is_send = type(operation) is Send
                end = ends.get((is_send, peer, stream))
                if end is None:
                    channel = self._channels[(rank, peer, stream) if is_send else (peer, rank, stream)]
                    end = channel.events, channel.sends if is_send else channel.receives
                    ends[is_send, peer, stream] = end
                events, tensors = end
                if len(tensors) == len(events):
                    events.append(len(comers))
                    comers.append(0)
                row.append(events[len(tensors)])
                tensors.append(tensor)
                if not is_send:
                    if tensor in arrivals:
                        raise ScheduleError(f'{self._names[rank]}: "{operation.what}" stands there twice')
                    arrivals[tensor] = row[-1]
            elif isinstance(operation, Compute):
                row.append(~_NOTHING)
                self._uses[rank].append([self._use(rank, operation, tensor, arrivals) for tensor in operation.uses])
            else:
                group = operation.axis, operation.ranks
                if met[group] == len(groups[group]):
                    groups[group].append(len(comers))
                    comers.append(len(operation.ranks))
                row.append(groups[group][met[group]])
                met[group] += 1
        return row

    def _use(self, rank: int, operation: Compute, tensor: int, arrivals: dict[int, int]) -> int:
        arrival = arrivals.get(tensor)
        if arrival is None:
            raise ScheduleError(f'{self._names[rank]}: "{operation.what}" stands before the receive of what it uses')
        if arrival == _USED:
            raise ScheduleError(f'{self._names[rank]}: "{operation.what}" uses what has been used before')
        arrivals[tensor] = _USED
        return arrival

    def _unmatched(self, sender: int, receiver: int, streams: Sequence[str], why: str = "") -> ScheduleError:
        """Why the two ends of a channel differ, or of the channels of several streams in one line."""
        ends: list[list[Send | Receive]] = []
        for rank, peer, kind in ((sender, receiver, Send), (receiver, sender, Receive)):
            mine = (one for one in self._programs[rank] if isinstance(one, kind) and one.peer == peer)
            ends.append([one for one in mine if one.stream in streams])
        sends, receives = (Counter(one.tensor for one in end) for end in ends)
        names = self._names[sender], self._names[receiver]
        for operation in ends[0]:
            if sends[operation.tensor] > receives[operation.tensor]:
                return ScheduleError(f'{names[0]} comes to "{operation.what}", which {names[1]} does not receive')
        for operation in ends[1]:
            if receives[operation.tensor] > sends[operation.tensor]:
                return ScheduleError(f'{names[1]} waits at "{operation.what}", which {names[0]} does not send')
        k = next(k for k, (send, receive) in enumerate(zip(*ends, strict=True)) if send.tensor != receive.tensor)
        return ScheduleError(
            f'message {k} from {names[0]} to {names[1]} is "{ends[0][k].what}" at one end and "{ends[1][k].what}" at '
            f"the other{why}"
        )

    def lanes(self, semantics: Semantics) -> tuple[list[_Lane], list[int]]:
        """The lanes under one semantics, and of each event how many have not come to it: all that it takes."""
        if semantics is Semantics.ONE_STREAM:
            self._check_one_line()
        if semantics in (Semantics.ONE_STREAM, Semantics.TWO_STREAMS):
            ranks = range(len(self._programs))
            lanes = [lane for rank in ranks for lane in self._streams(rank, semantics is Semantics.ONE_STREAM)]
            return lanes, [comers or 4 for comers in self._comers] + [2] * len(self._comers)
        rows = self._events
        if semantics is Semantics.BUFFERED:
            rows = [
                [~event if type(operation) is Send else event for operation, event in zip(program, row, strict=True)]
                for program, row in zip(self._programs, rows, strict=True)
            ]
        lanes = [_Lane(*lane) for lane in zip(self._names, rows, map(list, self._programs), strict=True)]
        return lanes, [comers or 2 for comers in self._comers]

    def _check_one_line(self) -> None:
        """The k-th message between two ranks is the same at both ends, whatever its stream."""
        tensors: dict[tuple[int, int], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for rank, program in enumerate(self._programs):
            for operation in program:
                if type(operation) is Send:
                    tensors[rank, operation.peer][0].append(operation.tensor)
                elif type(operation) is Receive:
                    tensors[operation.peer, rank][1].append(operation.tensor)
        for (sender, receiver), (sends, receives) in tensors.items():
            if sends != receives:
                streams = [key[2] for key in self._channels if key[:2] == (sender, receiver)]
                raise self._unmatched(sender, receiver, streams, f", with {Semantics.ONE_STREAM.value}")

    def _streams(self, rank: int, one_line: bool) -> list[_Lane]:
        """The lane of a rank, and those of the ordered streams in which its transfers stand.

        A transfer begins when it is at the head of the lines of both ends and both ranks have come to it, which is
        after all that they compute in front of it (a stream of NCCL waits for what has been launched before). The ranks
        go on at once; what uses the tensor waits for its arrival, an event of its own.
        """
        name, arrival = self._names[rank], len(self._comers)
        mine = _Lane(name, [], [])
        lines: dict[str, _Lane] = {}
        uses = iter(self._uses[rank])
        for operation, event in zip(self._programs[rank], self._events[rank], strict=True):
            if isinstance(operation, Compute):
                for used in next(uses):
                    mine.add(arrival + used, operation)
            elif isinstance(operation, Collective):
                mine.add(event, operation)
            else:
                mine.add(~event, operation)
                stream = "" if one_line else operation.stream
                if stream not in lines:
                    lines[stream] = _Lane(
                        f"the {stream} stream of {name}" if stream else f"the stream of {name}", [], []
                    )
                lines[stream].add(event, operation)
                if type(operation) is Receive:
                    lines[stream].add(~(arrival + event), operation)
        return [mine, *lines.values()]


def _run(lanes: Sequence[_Lane], missing: list[int]) -> None:
    """Moves each lane as far as it comes."""
    standing: dict[int, list[int]] = defaultdict(list)  # event -> the lanes that wait at it
    ready = list(range(len(lanes)))
    while ready:
        number = ready.pop()
        lane = lanes[number]
        events, position = lane.events, lane.position
        while position < len(events):
            event = events[position]
            waits = event >= 0
            if not waits:
                event = ~event
            missing[event] -= 1
            if missing[event] == 0:
                for other in standing.pop(event, ()):
                    lanes[other].position += 1
                    ready.append(other)
            elif waits:
                standing[event].append(number)
                break
            position += 1
        lane.position = position


def _cycle(lanes: Sequence[_Lane]) -> str:
    """A shortest cycle of lanes that wait for each other, where some have stopped."""
    stopped = [number for number, lane in enumerate(lanes) if lane.position < len(lane.events)]
    comers: dict[int, set[int]] = defaultdict(set)  # event -> the lanes that have yet to come to it
    for number in stopped:
        for event in lanes[number].events[lanes[number].position + 1 :]:
            comers[max(event, ~event)].add(number)
    waits_for = {number: sorted(comers[lanes[number].events[lanes[number].position]]) for number in stopped}
    cycle = min((path for number in stopped if (path := _way_back(number, waits_for))), key=len)
    waits = [
        f'waits at "{lanes[number].operations[lanes[number].position].what}" for {lanes[other].name}'
        for number, other in zip(cycle, [*cycle[1:], cycle[0]], strict=True)
    ]
    return f"{lanes[cycle[0]].name} " + ", which ".join(waits)


def _way_back(start: int, waits_for: dict[int, list[int]]) -> list[int]:
    """The lanes on a shortest way from ``start`` to itself, or none."""
    before: dict[int, int] = {}
    reached = deque([start])
    while reached:
        number = reached.popleft()
        for other in waits_for[number]:
            if other == start:
                path = [number]
                while path[-1] != start:
                    path.append(before[path[-1]])
                return path[::-1]
            if other not in before:
                before[other] = number
                reached.append(other)
    return []
