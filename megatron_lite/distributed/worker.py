"""The far side of `worker_pool`: the zygote that forks workers, and what one worker does.

The zygote is a fresh interpreter that imports torch once and then forks a worker whenever the pool asks. It has no
threads and never touches a device, so a fork of it is safe at any time. Workers leave nothing behind when the pool's
process dies, however it dies: the zygote sees end-of-file on its control socket and kills them, and the kernel kills
them should the zygote itself be killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import io
import os
import pickle
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megatron_lite.distributed.hosts import use_loopback

FORK, WAIT = b"F", b"W"
DUMP_STACK_SIGNAL = signal.SIGUSR1


@dataclass(frozen=True)
class Job:
    """One rank's share of `WorkerPool.run`. `call` is the packed (function, args, kwargs)."""

    call: bytes
    rank: int
    world_size: int
    store_path: str
    collective_timeout_s: float
    threads: int
    sys_path: tuple[str, ...]
    cwd: str


@dataclass(frozen=True)
class Success:
    """The packed return value of one rank."""

    value: bytes


@dataclass(frozen=True)
class Failure:
    """An exception of one rank: its one-line summary and its whole traceback."""

    summary: str
    traceback: str


class _Packer(pickle.Pickler):
    """Pickles tensors by their own bytes: no shared memory, no file descriptors, and a view costs only its own size."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) not in (torch.Tensor, torch.nn.Parameter) or obj.layout != torch.strided or obj.is_quantized:
            return NotImplemented
        if obj.device.type == "meta":
            return NotImplemented
        flat = obj.detach().cpu().contiguous().reshape(-1)
        return _tensor_from_bytes, (bytearray(flat.view(torch.uint8).numpy()), obj.dtype, tuple(obj.shape))


def _tensor_from_bytes(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def pack(obj: Any) -> bytes:
    """Pickle `obj` to bytes; tensors become plain CPU tensors (no autograd history, no sharing of storage)."""
    buffer = io.BytesIO()
    _Packer(buffer, protocol=5).dump(obj)
    return buffer.getvalue()


def unpack(data: bytes) -> Any:
    """The inverse of `pack`."""
    return pickle.loads(data)


def zygote_main(control_fd: int, preload: Sequence[str], folder: str) -> NoReturn:
    """Serve the pool over the control socket until it closes: `FORK` (with a channel's descriptor) answers the new
    worker's pid, `WAIT` pid answers its wait status. A pid is not reused before its `WAIT`, so the pool may signal it.
    """
    control = socket.socket(fileno=control_fd)
    # is_available() asks the driver library by default, and a process that was forked after that cannot use CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    for name in preload:
        # A module that cannot be imported is reported by the first job that needs it, with its own traceback.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    children: set[int] = set()
    while True:
        try:
            message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        except OSError:
            message, descriptors = b"", []
        if not message:
            break
        if message == FORK:
            pid = os.fork()
            if pid == 0:
                control.close()
                _worker_main(Connection(descriptors[0]), Path(folder))
            os.close(descriptors[0])
            children.add(pid)
            control.sendall(pid.to_bytes(8, "little"))
        else:
            assert message[:1] == WAIT, message
            pid = int.from_bytes(message[1:], "little")
            _, status = os.waitpid(pid, 0)
            children.discard(pid)
            control.sendall(status.to_bytes(8, "little"))
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def stack_path(folder: Path, pid: int) -> Path:
    """Where a worker writes the stacks of its threads when it receives `DUMP_STACK_SIGNAL`."""
    return folder / f"stack-{pid}.txt"


def output_path(folder: Path, pid: int) -> Path:
    """Where a worker's stdout and stderr go."""
    return folder / f"output-{pid}.txt"


def _worker_main(channel: Connection, folder: Path) -> NoReturn:
    try:
        _die_with_parent()
        pid = os.getpid()
        output = os.open(output_path(folder, pid), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        faulthandler.register(DUMP_STACK_SIGNAL, open(stack_path(folder, pid), "w"), all_threads=True)  # noqa: SIM115
        use_loopback()
        while True:
            job = pickle.loads(channel.recv_bytes())
            reply = _run_job(job)
            channel.send_bytes(pickle.dumps(reply))
            # The group lives until every rank has reported: a rank that leaves early would break its peers' last
            # messages, and a rank that failed would bury its own error under their "connection closed".
            channel.recv_bytes()
            if dist.is_initialized():
                dist.destroy_process_group()
            # A group that a cycle of objects keeps alive has threads, which are busy once their peers have gone.
            gc.collect()
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _run_job(job: Job) -> Success | Failure:
    try:
        sys.path[:] = job.sys_path
        os.chdir(job.cwd)
        torch.set_num_threads(job.threads)
        torch.set_default_dtype(torch.float32)  # whatever the last job left
        torch.manual_seed(0)
        function: Callable[..., Any]
        function, args, kwargs = unpack(job.call)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(job.store_path, job.world_size),
            rank=job.rank,
            world_size=job.world_size,
            timeout=timedelta(seconds=job.collective_timeout_s),
        )
        return Success(pack(function(*args, **kwargs)))
    except BaseException as error:
        return Failure(summary=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux; elsewhere the zygote's own clean-up serves)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
