"""megatron-lite generate"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megatron_lite.cli.common import Debug, errors_told
from megatron_lite.cli.ranks import run_in_ranks, started_by_launcher


class GenerateDtype(StrEnum):
    """Arithmetic of generation."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class GenerateDevice(StrEnum):
    """Where it runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class EarlyStop(StrEnum):
    """When beams are done."""

    likely = "likely"
    first = "first"
    never = "never"


EARLY_STOPPING = {EarlyStop.likely: False, EarlyStop.first: True, EarlyStop.never: "never"}

Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="Folder of a run, of a checkpoint, or of a Hugging Face model.")
]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; may be repeated.", show_default="stdin")
]
PromptFile = Annotated[
    Path | None,
    typer.Option(help='Prompts, one a line; of a .jsonl file the text under "prompt".', show_default=False),
]
Temperature = Annotated[float, typer.Option(help="Below 1 likelier tokens are preferred; 0 is --greedy.")]
TopK = Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens.", show_default="all")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")]
Beams = Annotated[int, typer.Option(help="Search for the likeliest text with this many beams.")]
LengthPenalty = Annotated[float, typer.Option(help="Of beams: above 0 long texts win, below 0 short ones.")]
EarlyStopping = Annotated[
    EarlyStop,
    typer.Option(
        help="Of beams: end when no running one is better (likely), when as many as beams have ended (first), or "
        "when none can become better (never)."
    ),
]
Stop = Annotated[list[str] | None, typer.Option(help="Cut the text before this; may be repeated.", show_default=False)]
TokenizerFile = Annotated[
    Path | None, typer.Option(help="A tokenizer.json, or its folder.", show_default="the model's own")
]
NumProcesses = Annotated[
    int | None,
    typer.Option(help="Start this many processes on this machine.", show_default="join a launcher, or tp * pp"),
]


def generate(
    source: Source,
    prompt: Prompts = None,
    prompt_file: PromptFile = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation, tokens.")] = 128,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 tokens that were there are less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random numbers; a layout changes nothing.")] = 0,
    beams: Beams = 1,
    length_penalty: LengthPenalty = 1.0,
    early_stopping: EarlyStopping = EarlyStop.likely,
    stop: Stop = None,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on after tokens that end a text.")] = False,
    tokenizer: TokenizerFile = None,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Prompts and output are token ids: 17,4,256.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print a JSON object for each prompt.")] = False,
    dtype: Annotated[GenerateDtype, typer.Option(help="Of weights and arithmetic.")] = GenerateDtype.float32,
    device: Annotated[
        GenerateDevice, typer.Option(help="auto: cuda with a device for each process.")
    ] = GenerateDevice.auto,
    tp: Annotated[int, typer.Option(help="Tensor-parallel size.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    nproc: NumProcesses = None,
    batch_size: Annotated[int, typer.Option(help="Prompts that are computed together.")] = 16,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compute all positions for each token; slow.")] = False,
    debug: Debug = False,
) -> None:
    """Continue a text with a trained model, token by token.

    Processes beyond tp * pp share the prompts. The speed is printed on stderr.

    Examples:

      megatron-lite generate runs/quickstart --prompt "def main(" --temperature 0.8 --top-p 0.95

      megatron-lite generate my-model --prompt-file questions.txt --greedy --jsonl --tp 2 --nproc 4 > answers.jsonl

      head -c 500 README.md | megatron-lite generate runs/quickstart/checkpoints/step-00000200 --beams 4
    """
    with errors_told(debug):
        from megatron_lite.inference.command import Request
        from megatron_lite.inference.generate import Settings

        _refuse_unused(greedy, beams, {"--temperature": temperature != 1, "--top-k": top_k, "--top-p": top_p != 1})
        settings = Settings(
            max_new_tokens=max_new_tokens,
            temperature=0.0 if greedy else temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            num_beams=beams,
            length_penalty=length_penalty,
            early_stopping=EARLY_STOPPING[early_stopping],  # type: ignore[arg-type]
            seed=seed,
            stop=tuple(stop or ()),
            batch_size=batch_size,
            use_cache=not no_cache,
        )
        request = Request(
            source,
            read_prompts(prompt, prompt_file),
            settings,
            tokenizer=tokenizer,
            token_ids=token_ids,
            ignores_end=ignore_end,
            as_jsonl=jsonl,
            dtype=dtype.value,
            tp=tp,
            pp=pp,
            device=device.value,
        )
        if nproc is None and tp * pp > 1 and not started_by_launcher():
            nproc = tp * pp
    run_in_ranks("megatron_lite.inference.command", "run", (request,), nproc=nproc, debug=debug)


def _refuse_unused(greedy: bool, beams: int, given: dict[str, object]) -> None:
    """Raises ValueError for options of sampling beside one that does not draw."""
    drawless = "--greedy" if greedy else f"--beams {beams}" if beams > 1 else None
    unused = [option for option, is_given in given.items() if is_given]
    if drawless and unused:
        raise ValueError(f"{drawless} draws nothing, so {' and '.join(unused)} would do nothing; leave one of them out")


def read_prompts(prompts: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """The prompts of the options, or all of stdin as one. Raises ValueError where there are none, or two kinds."""
    if prompts and file:
        raise ValueError("--prompt and --prompt-file both give prompts; leave one of them out")
    if prompts:
        return _checked(prompts, "--prompt")
    if file is not None:
        return _checked(_read_file(file), str(file))
    if started_by_launcher() or sys.stdin.isatty():
        raise ValueError('there is no prompt; add --prompt "TEXT" or --prompt-file FILE, or pipe a text in')
    try:
        return _checked([sys.stdin.read().removesuffix("\n")], "the text on stdin")
    except UnicodeDecodeError as error:
        raise ValueError(f"the text on stdin is not UTF-8 ({error}); convert it first") from None


def _checked(prompts: list[str], where: str) -> tuple[str, ...]:
    """The prompts. Raises ValueError for halves of surrogate pairs: so Python hands on bytes that are no UTF-8."""
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            which = f"{where} {number}" if len(prompts) > 1 else where
            raise ValueError(f"{which}: is not UTF-8 at character {error.start}; convert it first") from None
    return tuple(prompts)


def _read_file(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 ({error}); convert it first") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}; correct the path or its permissions") from None
    # Not splitlines: a text in JSON may hold what Unicode counts as the end of a line.
    lines = text.removesuffix("\n").split("\n") if text else []
    if file.suffix == ".jsonl":
        lines = [_prompt_of(line, file, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{file}: has no line; write one prompt on each")
    return lines


def _prompt_of(line: str, file: Path, number: int) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise ValueError(f'{file}:{number}: is not a JSON object with a text under "prompt"')
    return prompt
