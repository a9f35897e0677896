"""torchrun, as runs of this package want it: `python -m megatron_lite.distributed.agent` takes what torchrun takes.

It is torch's own agent, and what differs stands here:

- ranks have time to write a checkpoint after a signal, and SIGUSR1 is for them too (`SETTINGS`);
- an error that the user can mend is said once, and neither that nor a run that was stopped is started again;
- ranks are told how often they have been started, also where torch does not count: when machines come and go;
- an agent that is cut off from the head ends (`watch`);
- it ends with the exit code of its ranks, where torchrun has 1 for everything.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_lite.distributed.environments import ATTEMPT_VARIABLE
from megatron_lite.distributed.rank import EXIT_FAILURE, EXIT_REQUEUE, describe, end_of_failure, exit_code_of

# What the environment does not say already. The store of the agents keeps what ranks before a restart have written:
# with one of their own the new ones do not read the addresses of the dead. Without a number of threads torchrun sets
# one, with a warning; the trainer chooses its own.
SETTINGS = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "OMP_NUM_THREADS": "1",
}
# Twice what one question to the head may take (launch/torchrun.sh: read_timeout).
PATIENCE_S = 60.0
LOOK_EVERY_S = 1.0
# The function of torch's agent that asks the head.
ASKS = "_call_store"


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the ranks of this machine and waits for them. Returns the exit code: 0; that of the first rank that
    failed; for a signal to this process 75, or 128 and its number (`exit_code_of`)."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    vars(api)["LocalElasticAgent"] = agent_class()  # what torchrun makes one of
    threading.Thread(target=watch, name="watch", daemon=True).start()
    try:
        run.run(run.parse_args(arguments))
    except SignalException as error:
        return exit_code_of(error.sigval)
    except ChildFailedError as error:
        end = end_of_failure(*error.get_first_failure())
        if not end.is_said:
            print(describe(end, None, None), file=sys.stderr, flush=True)
        return end.exit_code if end.exit_code > 0 else EXIT_FAILURE
    return 0


def agent_class() -> type:
    """Torch's agent of one machine, which counts its starts, and does not start anew what would end again as it did."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):
        num_starts = 0

        def _start_workers(self, worker_group: Any) -> Any:
            os.environ[ATTEMPT_VARIABLE] = str(self.num_starts)
            self.num_starts += 1
            return super()._start_workers(worker_group)

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            ends = [end_of_failure(*item) for item in result.failures.items()]
            if any(end.is_user_error or end.exit_code == EXIT_REQUEUE for end in ends):
                self._remaining_restarts = 0
            return result

    return Agent


def watch(patience_s: float = PATIENCE_S, look_every_s: float = LOOK_EVERY_S) -> None:
    """Ends this process when one of its threads has waited for an answer of the head for longer than `patience_s`, and
    no rank is left that a link that comes back would help. Never returns.

    Between two looks at its ranks the agent asks the head whether machines wait to join, and a thread of it tells the
    head that it is there. Where the link is cut they wait for an answer as long as TCP does, a quarter of an hour, and
    see meanwhile neither the end of the ranks nor a signal.
    """
    asked_at = dict[FrameType, float]()
    while True:
        time.sleep(look_every_s)
        now = time.monotonic()
        asking = [frame for frame in sys._current_frames().values() if frame.f_code.co_name == ASKS]
        asked_at = {frame: asked_at.get(frame, now) for frame in asking}
        waited_s = now - min(asked_at.values(), default=now)
        if waited_s > patience_s and not has_living_children():
            print(
                f"error: the head has not answered torchrun's agent on {socket.gethostname()} for {waited_s:.0f} s, "
                "and its ranks have ended; see that the head runs and the link to it holds, and start this again",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_FAILURE)


def has_living_children() -> bool:
    """Whether this process has one that has not ended (one that nobody has asked for its exit code yet has)."""
    for listing in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in listing.read_text().split():
                if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    return True
    return False


if __name__ == "__main__":
    sys.exit(main())
