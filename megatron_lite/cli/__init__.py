"""The ``megatron-lite`` command. Every command imports what it needs when it runs, so that help comes at once.

Exit codes: 0 all is well; 1 a proof is broken, or something failed that should not; 2 the user can mend it; 75 a signal
has stopped training, which goes on when it is started again; 130 Ctrl-C.
"""

from __future__ import annotations

import signal

import typer

from megatron_lite.cli.check import check
from megatron_lite.cli.convert import convert
from megatron_lite.cli.data import data
from megatron_lite.cli.doctor import doctor
from megatron_lite.cli.eval import evaluate
from megatron_lite.cli.generate import generate
from megatron_lite.cli.launch import launch
from megatron_lite.cli.plan import plan
from megatron_lite.cli.report import report
from megatron_lite.cli.train import train
from megatron_lite.cli.verify import verify

app = typer.Typer(
    help="Train transformers in 3D parallel on any machine, and prove that every layout computes the same thing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order of the help.
for command in (train, launch, verify, check, plan, data, convert, generate, report, doctor):
    app.command()(command)
app.command("eval")(evaluate)


def main() -> None:
    try:
        app(prog_name="megatron-lite")
    finally:
        # The command has its exit code. A signal that comes once more, while Python ends, changes nothing.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
