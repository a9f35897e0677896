"""Processes that encode, one for each core: without the locks and the barriers that threads of one process share."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatron_lite.utils.files import DataError

_WORKER = Path(__file__).with_name("encode_worker.py")


class Workers:
    """A context manager. When it ends, so do the processes; so they do when this process is killed.

    Args:
        tokenizer, continuation: as `Encoder` has them.
        dtype: of the ids.

    Raises:
        DataError: a process cannot be started, or was ended from outside.
    """

    def __init__(self, count: int, tokenizer: Tokenizer, continuation: Tokenizer | None, dtype: np.dtype[Any]) -> None:
        self.count = count
        self._dtype = dtype
        serialized = [each and each.to_str() for each in (tokenizer, continuation)]
        self._first = pickle.dumps((serialized, dtype.char), pickle.HIGHEST_PROTOCOL)
        self._all: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def encode(self, texts: Sequence[str], begins: Sequence[bool]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """(ids, number of ids of each text); from up to `count` threads at a time."""
        process = self._idle.get()
        try:
            sink, source = _pipes(process)
            pickle.dump((texts, begins), sink, pickle.HIGHEST_PROTOCOL)
            sink.flush()
            ids, lengths = pickle.load(source)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise DataError(
                f"a process that encodes text ended with code {process.wait()} (-9: killed, as where memory is short); "
                "give the same command again: it goes on from here"
            ) from error
        finally:
            self._idle.put(process)
        return np.frombuffer(ids, self._dtype), np.frombuffer(lengths, np.int64)

    def __enter__(self) -> Workers:
        # Each has one core, so the library is to start no threads.
        command = ["env", "TOKENIZERS_PARALLELISM=false", sys.executable, "-P", str(_WORKER)]
        try:
            for _ in range(self.count):
                self._all.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            for process in self._all:
                sink, _ = _pipes(process)
                sink.write(self._first)
                self._idle.put(process)
        except OSError as error:
            self._end()
            raise DataError(f"a process that encodes text cannot be started: {error.strerror}") from error
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._all:
            process.kill()
        for process in self._all:
            process.wait()
            for pipe in _pipes(process):
                with suppress(OSError):  # what was still to be sent has no reader any more
                    pipe.close()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout
