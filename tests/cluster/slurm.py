"""A Slurm cluster on this machine: a real slurmctld and two real slurmd, up for the length of a `with` block.

Everything of it lives in namespaces of its own: when the first process in there is killed, the system ends all the
others, jobs and the daemons that Slurm starts for them included. The network is this machine's, on free ports. Each
node has a host name and a loopback address of its own, which all nodes know by that name. The nodes pretend to have
eight GPUs and many cores, so that what is shipped for real clusters is accepted as it is.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.commands import ROOT, outside_environment

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "setpriv", "unshare")
NODES = ("node1", "node2")
CONTROLLER = "controller"
GPUS, CPUS, MEMORY_MB = 8, 64, 500_000
CLIENT_TIMEOUT_S = 60
# A job that is requeued waits two minutes before it may start.
WAITS_FOR_ITS_TIME = "BeginTime"
UNFINISHED = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"}

# Process 1 of the cluster. Everything else is its child, and ends with it.
START = r"""
set -euo pipefail
mount --bind "$FOLDER/hosts" /etc/hosts
hostname controller
cd "$FOLDER"
munged --foreground --force --num-threads=2 --key-file=munge.key --socket="$FOLDER/munge.socket" \
  --pid-file="$FOLDER/munged.pid" --seed-file="$FOLDER/munge.seed" --log-file="$FOLDER/munged.log" &
until [ -S munge.socket ]; do sleep 0.02; done
slurmctld -D -c -f "$SLURM_CONF" &
for node in "$@"; do
  unshare --uts --mount -- bash -c \
    'hostname "$0" && mount --bind "$FOLDER/disk-$0" "$FOLDER/disk" && exec slurmd -D -f "$SLURM_CONF"' "$node" &
done
wait
"""


@dataclass(frozen=True)
class Job:
    """What slurmctld says of a job. index: in its array, or 0. exit_code: of the batch script."""

    number: int
    index: int
    state: str
    reason: str
    exit_code: int
    restarts: int
    output: Path

    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def lines(self, *parts: str) -> list[str]:
        """The lines of its output that hold all of the parts."""
        return [line for line in self.said().splitlines() if all(part in line for part in parts)]


class Cluster:
    """The clients of a cluster that is up.

    environment: what a command needs to find it, and ranks to find one another: their hosts' names lead to addresses of
    the loopback, which is right here. disk: a folder that is another one on each node; disks: where it is from outside.
    """

    def __init__(self, folder: Path) -> None:
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "GLOO_SOCKET_IFNAME": "lo"}
        self.disk = folder / "disk"
        self.disks = {node: folder / f"disk-{node}" for node in NODES}

    def call(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """A client, such as sbatch or scontrol, to its end. Its jobs inherit its environment, and outlive it."""
        return subprocess.run(
            list(map(str, arguments)),
            cwd=ROOT,
            env={**outside_environment(), **self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CLIENT_TIMEOUT_S,
        )

    def ask(self, *arguments: object) -> str:
        result = self.call(*arguments)
        assert result.returncode == 0, f"{arguments}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(
        self,
        script: Path,
        *arguments: object,
        options: Sequence[object] = (),
        output: Path,
        **environment: str,
    ) -> int:
        """sbatch; returns the number of the job. output: a folder for what it prints."""
        command = ["sbatch", "--parsable", f"--output={output}/%x-%j.out", *options, script, *arguments]
        result = self.call(*command, **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return int(result.stdout)

    def jobs(self, number: int) -> list[Job]:
        """The job, or those of its array in order."""
        found = []
        for line in self.ask("scontrol", "show", "job", number, "--oneliner").splitlines():
            fields: dict[str, str] = {}
            for name, value in re.findall(r"(\w+)=(\S*)", line):
                fields.setdefault(name, value)  # the job's arguments come late, and look alike
            found.append(
                Job(
                    number=int(fields["JobId"]),
                    index=int(re.findall(r"\d+", fields.get("ArrayTaskId", "0"))[0]),  # 1-8, while they wait
                    state=fields["JobState"],
                    reason=fields["Reason"],
                    exit_code=int(fields["ExitCode"].partition(":")[0]),
                    restarts=int(fields["Restarts"]),
                    output=Path(fields["StdOut"]),
                )
            )
        return sorted(found, key=lambda job: job.index)

    def job(self, number: int) -> Job:
        (found,) = self.jobs(number)
        return found

    def wait(self, number: int, timeout_s: float = 180) -> list[Job]:
        """Until the job, or all of its array, has ended. One that was requeued need not wait for its time."""
        deadline = time.monotonic() + timeout_s
        hurried = set[tuple[int, int]]()
        while True:
            jobs = self.jobs(number)
            if not any(job.state in UNFINISHED for job in jobs):
                return jobs
            for job in jobs:
                life = (job.number, job.restarts)
                if job.state == "PENDING" and job.reason == WAITS_FOR_ITS_TIME and life not in hurried:
                    hurried.add(life)
                    self.hurry(job.number)
            assert time.monotonic() < deadline, "\n".join(f"{job}:\n{job.said()}" for job in jobs)
            time.sleep(0.2)

    def hurry(self, number: int, *changes: str) -> None:
        """Lets a job that was requeued start soon: not before its nodes are done with its last life, for one that is
        not fails the next at once, and for that Slurm has its two minutes. changes: as scontrol update has them."""
        deadline = time.monotonic() + CLIENT_TIMEOUT_S
        while _has_daemons(number):
            assert time.monotonic() < deadline, f"something of job {number} is left"
            time.sleep(0.05)
        self.ask("scontrol", "update", f"jobid={number}", "StartTime=now+2", *changes)

    def clear(self) -> None:
        """Ends every job, and waits until the nodes are free."""
        self.ask("scancel", "--user=root")
        self.wait_until_idle()

    def wait_until_idle(self, timeout_s: float = 120, is_alive: Callable[[], bool] = lambda: True) -> None:
        deadline = time.monotonic() + timeout_s
        while self.call("sinfo", "--noheader", "--states=idle", "--format=%D").stdout.strip() != str(len(NODES)):
            assert is_alive() and time.monotonic() < deadline, "the nodes of the Slurm cluster do not become idle"
            time.sleep(0.1)


@contextlib.contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """Two nodes, idle. Needs root and `PROGRAMS`."""
    with tempfile.TemporaryDirectory(prefix="mls_", dir="/tmp") as name, contextlib.ExitStack() as stack:
        folder = Path(name)  # short: the path of a socket has 107 bytes
        cluster = Cluster(folder)
        _write_files(folder)
        for disk in (cluster.disk, *cluster.disks.values()):
            disk.mkdir()
        log = stack.enter_context((folder / "start.log").open("wb"))
        path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
        # --pdeathsig: should this process be killed, the cluster goes too.
        own = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child"]
        first = subprocess.Popen(
            [*own, "--mount-proc", "bash", "-c", START, "start", *NODES],
            env={"PATH": path, "FOLDER": name, **cluster.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        stack.callback(_end, first)
        try:
            cluster.wait_until_idle(is_alive=lambda: first.poll() is None)
        except AssertionError as error:
            logs = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))
            raise AssertionError(f"{error}:\n{logs}") from None
        yield cluster


def _has_daemons(number: int) -> bool:
    """Whether a slurmstepd watches over a step of the job, or over its script."""
    title = f"slurmstepd: [{number}.".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and title in (entry / "cmdline").read_bytes():
                return True
    return False


def _end(first: subprocess.Popen[bytes]) -> None:
    """Kills process 1 of the namespace. Its parent has ended when every process in there has."""
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    if not children:
        first.kill()
    first.wait()


def _write_files(folder: Path) -> None:
    """Its key, its host names, its GPUs and its slurm.conf."""
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    folder.chmod(0o755)  # munge wants to be reached
    addresses = {node: f"127.0.0.{11 + number}" for number, node in enumerate(NODES)}
    hosts = {"localhost": "127.0.0.1", CONTROLLER: "127.0.0.1", **addresses}
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
    for number in range(GPUS):
        (folder / f"gpu{number}").touch()  # Slurm counts the files of devices
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    controller_port, *ports = _free_ports(1 + len(NODES))
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{CONTROLLER}(127.0.0.1)",
        "SlurmctldPort": controller_port,
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd-%n.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd-%n.log",
        # No cgroups: these nodes share those of the machine.
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "MpiDefault": "none",
        "GresTypes": "gpu",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "SlurmdParameters": "config_overrides",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1",
        "EnforcePartLimits": "ALL",
        "ReturnToService": 2,
        "KillWait": 5,
        "MinJobAge": 3600,
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    for (node, address), port in zip(addresses.items(), ports, strict=True):
        size = f"CPUs={CPUS} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory={MEMORY_MB}"
        lines.append(f"NodeName={node} NodeAddr={address} Port={port} {size} Gres=gpu:{GPUS} State=UNKNOWN")
    lines.append("PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]
