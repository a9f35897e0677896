from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_lite.distributed import rank as rank_module
from megatron_lite.distributed.faults import is_user_error
from megatron_lite.distributed.launch import SAME_WISH_S, launch_local
from megatron_lite.distributed.meeting import MeetingError
from megatron_lite.distributed.rank import run_rank
from megatron_lite.distributed.rendezvous import world

HERE = f"{__name__}:"
STOPPED = "SIGTERM: stopping; once more ends at once\nstopped by SIGTERM; all 2 ranks have ended\n"


def meet(folder: str, word: str, port: int | None = None) -> None:
    with world(timeout_s=60, device="cpu") as rendezvous:
        if port is not None:  # somebody listens there
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        total = torch.tensor([rendezvous.rank + 1.0])
        dist.all_reduce(total)
        account = {
            "total": total.item(),
            "word": word,
            "threads": torch.get_num_threads(),
            "place": [rendezvous.rank, rendezvous.world_size, rendezvous.local_rank, rendezvous.local_world_size],
        }
        Path(folder, f"{rendezvous.rank}.json").write_text(json.dumps(account))


def finish(folder: str, seconds: float) -> None:
    """Hears a stop, and has nothing left to stop."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    Path(folder, f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        time.sleep(0.1)


def end_badly(folder: str, failing: int, how: str) -> int:
    """All ranks meet, one (or, with -1, each) ends as told, and the others wait for it in a collective."""
    with world(timeout_s=60, device="cpu") as rendezvous:
        dist.barrier()
        Path(folder, f"{rendezvous.rank}.pid").write_text(str(os.getpid()))
        print(f"rank {rendezvous.rank} was here", flush=True)
        dist.barrier()
        if failing in (rendezvous.rank, -1):
            if how == "bug":
                raise KeyError("a bug")
            if how == "user":
                raise ValueError("model.tp is 3; use 2 or 4")
            if how == "return":
                return 3
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
        time.sleep(600)
    return 0


def pids(folder: Path) -> list[int]:
    written = (path.read_text() for path in folder.glob("*.pid"))
    return [int(text) for text in written if text]  # a file is there before what is written to it


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return state_of(pid) != "Z"


def state_of(pid: int) -> str:
    """The letter that /proc has for it."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def assert_all_end(folder: Path, nproc: int, within_s: float = 15) -> None:
    assert len(pids(folder)) == nproc
    deadline = time.monotonic() + within_s
    while any(is_alive(pid) for pid in pids(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in pids(folder))


def test_every_rank_runs_with_its_place_and_the_same_arguments(tmp_path: Path) -> None:
    assert launch_local(HERE + "meet", (str(tmp_path),), {"word": "a $$ stays"}, nproc=3) == 0
    accounts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [account["place"] for account in accounts] == [[rank, 3, rank, 3] for rank in range(3)]
    assert [account["total"] for account in accounts] == [6.0] * 3
    assert {account["word"] for account in accounts} == {"a $$ stays"}


def test_a_requested_port_is_used(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    assert launch_local(HERE + "meet", (str(tmp_path), "", port), nproc=2, port=port) == 0
    with socket.socket() as silent:  # the control: nobody listens there, and nobody else can while it is bound
        silent.bind(("", 0))
        assert launch_local(HERE + "meet", (str(tmp_path), "", silent.getsockname()[1]), nproc=1) == 2


def test_a_port_in_use_is_named_with_the_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is in use; choose another with --port, or leave it out"):
            launch_local(HERE + "meet", ("", ""), nproc=2, port=port)
    with pytest.raises(ValueError, match="port 70000 is not between 1 and 65535"):
        launch_local(HERE + "meet", ("", ""), nproc=2, port=70000)
    with pytest.raises(ValueError, match="nproc is 0; it must be at least 1"):
        launch_local(HERE + "meet", ("", ""), nproc=0)


def test_a_bug_in_one_rank_is_shown_once_and_ends_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert launch_local(HERE + "end_badly", (str(tmp_path), 2, "bug"), nproc=4, log_dir=tmp_path / "logs") == 1
    message = capfd.readouterr().err
    assert message.startswith("rank 2 of 4 failed: KeyError: 'a bug'\nTraceback (most recent call last):")
    assert message.count("Traceback") == 1 and "in end_badly" in message and "closed by peer" not in message
    assert f"the output of ranks 1 and up is in {tmp_path / 'logs'}" in message
    assert (tmp_path / "logs" / "rank3.log").read_text().startswith("rank 3 was here")
    assert_all_end(tmp_path, 4)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_users_error_in_every_rank_is_one_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local(HERE + "end_badly", (str(tmp_path), -1, "user"), nproc=4) == 2
    assert capfd.readouterr().err == "error: model.tp is 3; use 2 or 4\n"
    assert_all_end(tmp_path, 4)


@pytest.mark.parametrize("failing", [0, 3])
def test_a_killed_rank_is_named_and_not_those_that_lost_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], failing: int
) -> None:
    start = time.monotonic()
    assert launch_local(HERE + "end_badly", (str(tmp_path), failing, "kill"), nproc=4) == 1
    assert time.monotonic() - start < 30
    message = capfd.readouterr().err
    assert message.startswith(f"rank {failing} of 4 failed: the process was killed by SIGKILL")
    assert "Traceback" not in message
    assert ("rank 3 was here" in message) == (failing == 3)  # rank 0 has the terminal, not a file
    assert_all_end(tmp_path, 4)


def test_an_exit_code_that_a_rank_returns_is_passed_on_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch_local(HERE + "end_badly", (str(tmp_path), -1, "return"), nproc=2) == 3
    assert capfd.readouterr().err == ""


def start_in_a_process_of_its_own(folder: Path, call: str = "end_badly", *more: object) -> subprocess.Popen[str]:
    arguments = (str(folder), *(more or (99, "")))
    script = folder / "start.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from megatron_lite.distributed.launch import launch_local\n"
        "if __name__ == '__main__':\n"
        f"    args = {arguments!r}\n"
        f"    sys.exit(launch_local('{HERE}{call}', args, nproc=2, log_dir=Path({str(folder)!r}, 'logs')))\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    # A process that is killed cannot remove its temporary files.
    environment = dict(os.environ, PYTHONPATH=paths, TMPDIR=str(folder))
    return subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_signals_to_the_launching_process_end_all_ranks_and_rank_0_has_the_console(tmp_path: Path) -> None:
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        folder = tmp_path / number.name
        folder.mkdir()
        with start_in_a_process_of_its_own(folder) as agent:
            assert agent.stdout is not None and agent.stderr is not None
            assert agent.stdout.readline() == "rank 0 was here\n"
            deadline = time.monotonic() + 30
            while not (folder / "logs" / "rank1.log").exists() or len(pids(folder)) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            agent.send_signal(number)
            assert agent.wait(timeout=20) == code
            assert_all_end(folder, 2)
            assert agent.stdout.read() == ""
            if number == signal.SIGTERM:
                assert agent.stderr.read() == STOPPED


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stop_that_comes_when_all_are_nearly_done_stops_nothing(tmp_path: Path) -> None:
    """Nor does the agent wait for ranks that wait for it."""
    with start_in_a_process_of_its_own(tmp_path, "finish", 3.0) as agent:
        deadline = time.monotonic() + 60
        while len(pids(tmp_path)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(timeout=30) == 0
        assert_all_end(tmp_path, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_second_signal_ends_a_rank_that_hears_none(tmp_path: Path) -> None:
    with start_in_a_process_of_its_own(tmp_path) as agent:
        deadline = time.monotonic() + 60
        while len(pids(tmp_path)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        rank = pids(tmp_path)[0]
        os.kill(rank, signal.SIGSTOP)
        while state_of(rank) != "T":  # of two signals that wait, SIGTERM would come first
            time.sleep(0.01)
        agent.send_signal(signal.SIGTERM)
        time.sleep(SAME_WISH_S + 0.5)
        assert agent.poll() is None, "one wish: the rank is waited for"
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(timeout=20) == 143
        assert agent.stderr is not None and agent.stderr.read() == STOPPED
        assert_all_end(tmp_path, 2)


def raise_(error: Exception) -> None:
    raise error


def test_run_rank_alone_prints_what_the_user_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_rank(raise_, (ValueError("train.seq_len is 0"),), environ={}) == 2
    assert capsys.readouterr().err == "error: train.seq_len is 0\n"
    assert run_rank(raise_, (RuntimeError("a bug"),), environ={}) == 1
    assert capsys.readouterr().err.startswith("error: RuntimeError: a bug\nTraceback (most recent call last):")
    assert run_rank(lambda: 4, environ={}) == 4
    assert run_rank(lambda: None, environ={}) == 0
    assert run_rank(lambda: "a result", environ={}) == 0
    assert capsys.readouterr().err == ""


def test_run_rank_under_torchrun_speaks_once_a_host_and_tells_the_agent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for local_rank in (0, 1):
        error_file = tmp_path / f"{local_rank}.json"
        place = {"RANK": str(local_rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "2"}
        environ = {**place, "TORCHELASTIC_ERROR_FILE": str(error_file)}
        assert run_rank(raise_, (ValueError("a typo"),), environ=environ) == 2
        assert capsys.readouterr().err == ("error: a typo\n" if local_rank == 0 else "")
        assert json.loads(error_file.read_text())["message"]["message"] == "a typo"


@pytest.mark.parametrize("has_agent", [True, False])
def test_run_rank_leaves_to_rank_0_what_every_rank_has(
    has_agent: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait, so that it is not ended before it has spoken. Should it be, the agent beside it says it."""
    monkeypatch.setattr(rank_module, "PATIENCE_S", 0.5)
    for rank, local_rank, is_said in ((0, 0, True), (1, 1, False), (2, 0, True), (3, 1, True)):
        error_file = tmp_path / f"{rank}.json"
        place = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
        environ = {**place, "TORCHELASTIC_ERROR_FILE": str(error_file) if has_agent else ""}
        since = time.monotonic()
        assert run_rank(raise_, (MeetingError("a full disk"),), environ=environ) == 2
        assert (time.monotonic() - since > 0.4) == (rank > 0)
        assert capsys.readouterr().err == ("error: a full disk\n" if rank == 0 else "")
        if has_agent:
            assert json.loads(error_file.read_text())["megatron_lite"]["is_said"] == is_said


def test_a_rank_that_waits_for_rank_0_ends_when_it_is_told_with_its_own_code() -> None:
    environ = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    since = time.monotonic()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert run_rank(raise_, (MeetingError("a full disk"),), environ=environ) == 2
    assert time.monotonic() - since < rank_module.PATIENCE_S
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_librarys_own_value_error_is_a_bug_and_not_the_users() -> None:
    def caught(function: object, *args: object) -> BaseException:
        assert callable(function)
        try:
            function(*args)
        except Exception as error:
            return error
        raise AssertionError("no error")

    assert is_user_error(caught(raise_, ValueError("ours")))
    assert is_user_error(caught(raise_, OSError(errno.ENOSPC, "No space left on device")))
    assert is_user_error(ValueError("never raised"))
    assert not is_user_error(caught(json.loads, "{"))
    assert not is_user_error(caught(raise_, RuntimeError("ours")))
