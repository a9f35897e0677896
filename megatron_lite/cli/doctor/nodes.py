"""The doctor on several nodes of a Slurm cluster: the same command once more, as the ranks of a step."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from typing import NoReturn

from megatron_lite.cli.doctor.request import Request
from megatron_lite.distributed.environments import ASKED_VARIABLE


def command_on_nodes(request: Request, nodes: int, ranks_per_node: int | None) -> list[str]:
    """The srun that starts it. ranks_per_node: by default the GPUs of a node of --cluster, or one."""
    cluster = request.load_cluster()
    gpus = 0 if cluster is None else cluster.gpus_per_node
    ranks = ranks_per_node or gpus or 1
    step = ["srun", f"--nodes={nodes}", f"--ntasks-per-node={ranks}", "--kill-on-bad-exit=0"]
    step += [f"--gpus-per-node={min(ranks, gpus)}"] if gpus else []
    # srun gives a task one core unless it is told otherwise.
    step += [f"--cpus-per-task={max(1, cluster.cores_per_node // ranks)}"] if cluster is not None else []
    return [*step, "env", f"{ASKED_VARIABLE}={nodes * ranks}", sys.executable, "-m", "megatron_lite", *_words(request)]


def run_on_nodes(request: Request, nodes: int, ranks_per_node: int | None) -> NoReturn:
    """Prints the command and becomes it. Raises ValueError without Slurm."""
    command = command_on_nodes(request, nodes, ranks_per_node)
    if shutil.which(command[0]) is None:
        raise ValueError(
            "--nodes starts ranks by srun, which is not on the PATH here; start this command without --nodes by your "
            "launcher: mpirun -n N python -m megatron_lite doctor, or torchrun ... -m megatron_lite doctor on each host"
        )
    print(f"+ {shlex.join(command)}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.execvp(command[0], command)


def _words(request: Request) -> list[str]:
    """The command line that gives this request."""
    named = {
        "--config": "" if request.config is None else str(request.config),
        "--cluster": request.cluster,
        "--layout": request.layout,
        "--timeout": f"{request.timeout_s:g}",
    }
    flags = {"--verbose": request.verbose, "--json": request.as_json}
    return [
        "doctor",
        *request.overrides,
        *(word for option, value in named.items() if value for word in (option, value)),
        *(word for device in request.devices for word in ("--device", device)),
        *(flag for flag, is_given in flags.items() if is_given),
    ]
