"""Hosts of a small cluster on this machine: each with a network, a name, processes and shared memory of its own.

    with network(2, sshd=True) as (first, second):
        ended = first.run(["ping", "-c", "1", second.name])

A host is a process that holds Linux namespaces. Everything started on it ends with that process, and with it go the
interfaces, mounts and daemons. The switch between the hosts is one more such process, so that nothing is to be seen on
the machine itself, and two networks with the same names and addresses do not meet. The file system is shared, as on
most clusters; /run, /dev/shm and /etc/hosts are not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.commands import ROOT, Command, Ended, run

INTERFACE = "eth0"
# The end of the process that made it, however it came, is the end of a holder; and its end, that of what it holds.
HOLD = ("setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child", "--net", "--pid")
SWITCH = "set -e; ip link add switch type bridge; ip link set switch up; echo ready; sleep infinity & wait"
# bash waits for orphans as an init does. /sys shows the interfaces of the network it was mounted in.
HOST = r"""
set -e
hostname "$1"
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind "$2/$1.hosts" /etc/hosts
[ ! -e "$2/ssh_config" ] || mount --bind "$2/ssh_config" /etc/ssh/ssh_config
ip link set lo up
echo ready
sleep infinity & wait
"""
SSHD_CONFIG = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
"""
SSH_CONFIG = """
Host *
  User root
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


class Host:
    """A host that is up. Commands on it are seen from outside with their outside process ids."""

    def __init__(self, number: int, name: str, address: str, switch: int, folder: Path, *, sshd: bool) -> None:
        self.name, self.address = name, address
        self._number, self._switch, self._folder, self._sshd = number, switch, folder, sshd
        self._holder: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Up, on the network, with the address and the hardware address that it had before."""
        apart = ("--uts", "--ipc", "--mount", "--mount-proc")
        self._holder, self._pid = _hold([*HOLD, *apart, "bash", "-c", HOST, "bash", self.name, str(self._folder)])
        hardware = f"02:00:00:00:00:{self._number:02x}"
        ends = ("address", hardware, "name", INTERFACE, "netns", str(self._pid))
        self._on_switch("link", "add", self._port, "type", "veth", "peer", *ends)
        self._on_switch("link", "set", self._port, "master", "switch", "up")
        self._ip("addr", "add", f"{self.address}/24", "dev", INTERFACE)
        self._ip("link", "set", INTERFACE, "up")
        if self._sshd:
            _check([*self.enter(["/usr/sbin/sshd", "-f", self._folder / "sshd_config", "-E", "/run/sshd.log"])])

    def kill(self) -> None:
        """The end of every process on it, and of its interface. `start` brings it back."""
        if self._holder is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._holder.communicate()
            self._holder = None
            # The kernel takes a network apart some time after its last process; what has no power answers nothing.
            with contextlib.suppress(AssertionError):
                self._on_switch("link", "delete", self._port)

    def enter(self, arguments: Sequence[object], *, cwd: Path = ROOT) -> list[str]:
        """The command as one that runs on this host."""
        where = ("nsenter", "--target", str(self._pid), "--mount", "--uts", "--ipc", "--net", "--pid")
        return [*where, "env", "-C", str(cwd), *map(str, arguments)]

    def run(self, arguments: Sequence[object], *, cwd: Path = ROOT, **more: Any) -> Ended:
        """`commands.run` on this host."""
        return run(self.enter(arguments, cwd=cwd), cwd=cwd, **more)

    def command(self, arguments: Sequence[object], *, cwd: Path = ROOT, **more: Any) -> Command:
        """`commands.Command` on this host."""
        return Command(self.enter(arguments, cwd=cwd), cwd=cwd, **more)

    def limit(self, rate: str, *, burst: str = "256k", latency: str = "50ms") -> None:
        """Slows down what the host sends to a rate as tc writes it, like 1gbit."""
        shape = ("root", "tbf", "rate", rate, "burst", burst, "latency", latency)
        _check([*self._in_network, "tc", "qdisc", "replace", "dev", INTERFACE, *shape])

    def cut(self) -> None:
        """Unplugs the cable: no connection ends, and nothing arrives any more."""
        self._on_switch("link", "set", self._port, "down")

    def mend(self) -> None:
        self._on_switch("link", "set", self._port, "up")

    @property
    def network_namespace(self) -> Path:
        """Where an engine of containers finds the host's network."""
        return Path(f"/proc/{self._pid}/ns/net")

    @property
    def _port(self) -> str:
        return f"port{self._number}"

    @property
    def _in_network(self) -> tuple[str, ...]:
        return ("nsenter", "--target", str(self._pid), "--net")

    def _ip(self, *arguments: str) -> None:
        _check([*self._in_network, "ip", *arguments])

    def _on_switch(self, *arguments: str) -> None:
        _check(["nsenter", "--target", str(self._switch), "--net", "ip", *arguments])


@contextlib.contextmanager
def network(
    num_hosts: int, *, name: str = "host", subnet: str = "10.77.0", sshd: bool = False, own_name_at: str | None = None
) -> Iterator[list[Host]]:
    """Hosts `name`1, `name`2, ... at `subnet`.1, `subnet`.2, ..., every one of which knows the names of all.

    sshd: root can log in from each to each without a password. own_name_at: what each host takes for the address of
    its own name, such as 127.0.1.1, which Debian writes into /etc/hosts.
    """
    with tempfile.TemporaryDirectory(prefix="megatron_lite_hosts_") as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        addresses = {f"{name}{number}": f"{subnet}.{number}" for number in range(1, num_hosts + 1)}
        for own in addresses:
            lines = ["127.0.0.1 localhost"]
            for other, address in addresses.items():
                lines.append(f"{own_name_at if own_name_at and other == own else address} {other}")
            (folder / f"{own}.hosts").write_text("\n".join(lines) + "\n")
        if sshd:
            _check(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"])
            (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
            (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
        holder, switch = _hold([*HOLD, "bash", "-c", SWITCH])
        stack.callback(holder.communicate)
        stack.callback(os.kill, switch, signal.SIGKILL)
        hosts = [
            Host(number, own, address, switch, folder, sshd=sshd)
            for number, (own, address) in enumerate(addresses.items(), start=1)
        ]
        for host in hosts:
            stack.callback(host.kill)
            host.start()
        yield hosts


def _hold(command: Sequence[str]) -> tuple[subprocess.Popen[str], int]:
    """Starts a holder; returns it, and the id of the process in the namespaces, when that has said that it is ready."""
    holder = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
    )
    assert holder.stdout is not None
    if (said := holder.stdout.readline()) != "ready\n":
        holder.kill()
        raise RuntimeError(f"a host cannot be made: {said}{holder.communicate()[0]}")
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
    return holder, int(children[0])


def _check(command: Sequence[object]) -> None:
    ended = subprocess.run(
        [str(argument) for argument in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=20,
    )
    assert ended.returncode == 0, f"{ended.args}: {ended.stdout}"
