"""``megatron-lite generate`` as a person uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from megatron_lite.cli import app
from tests.inference.test_source import write_run, write_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    return write_run(place / "tiny", write_tokenizer(place / "data" / "tokenizer.json", 101))


def invoke(*args: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, args)], input=stdin, env={"COLUMNS": "200"})


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


COMMON = ("--max-new-tokens", 6, "--device", "cpu", "--ignore-end")


def test_text_streams_out_and_the_speed_is_told(run: Path) -> None:
    done = invoke(run, "--prompt", "w5", *COMMON)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("w5") and done.stdout.endswith("\n")
    assert "1 prompt tokens, 6 new ones in" in done.stderr and "tokens/s" in done.stderr
    again = invoke(run, "--prompt", "w5", *COMMON)
    assert again.stdout == done.stdout
    assert invoke(run, "--prompt", "w5", *COMMON, "--seed", 1).stdout != done.stdout


def test_json_lines(run: Path) -> None:
    done = invoke(run, "-p", "w5", "-p", "w9", "--jsonl", "--greedy", *COMMON)
    first, second = records(done.stdout)
    assert (first["prompt"], first["prompt_ids"], first["finish"]) == ("w5", [5], "length")
    assert len(first["token_ids"]) == len(second["token_ids"]) == 6 and first["text"]
    assert (
        "score" not in first and "score" in records(invoke(run, "-p", "w5", "--jsonl", "--beams", 2, *COMMON).stdout)[0]
    )
    zero = records(invoke(run, "-p", "w5", "--jsonl", "--temperature", 0, *COMMON).stdout)[0]
    assert zero["token_ids"] == first["token_ids"]


def test_token_ids_need_no_tokenizer(run: Path, tmp_path: Path) -> None:
    with_text = records(invoke(run, "-p", "w5", "--jsonl", "--greedy", *COMMON).stdout)[0]
    bare = write_run(tmp_path / "bare", None)
    done = invoke(bare, "-p", "5", "--token-ids", "--greedy", *COMMON)
    assert done.stdout == " ".join(map(str, [5, *with_text["token_ids"]])) + "\n"
    refused = invoke(bare, "-p", "w5", *COMMON)
    assert refused.exit_code == 2 and "no tokenizer comes with this model" in refused.stderr
    words = invoke(bare, "-p", "w5", "--token-ids", *COMMON)
    assert words.exit_code == 2 and "'w5' is not a list of token ids" in words.stderr


def test_prompts_from_a_file_and_from_a_pipe(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("w5\nw9\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5"}\n\n{"prompt": "w9", "id": 3}\n')
    common = ("--jsonl", "--greedy", *COMMON)
    expected = records(invoke(run, "-p", "w5", "-p", "w9", *common).stdout)
    for name in ("prompts.txt", "prompts.jsonl"):
        assert records(invoke(run, "--prompt-file", tmp_path / name, *common).stdout) == expected
    assert records(invoke(run, *common, stdin="w5\n").stdout) == expected[:1]
    end = records(invoke(run, *common, stdin="\n").stdout)[0]
    assert end["prompt_ids"] == [0]  # a text begins after the end of another


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-p", "a", "--prompt-file", "b"), "leave one of them out"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt"),
        (("-p", "w5", "--top-p", "0"), "top_p is 0.0"),
        (("-p", "w5", "--tp", "3", "--nproc", "1"), "--tp 3"),
        (("-p", "w5", "--nproc", "0"), "--nproc is 0"),
        (("-p", "w5", "--stop", "a", "--beams", "2"), "use one"),
    ],
)
def test_mistakes_are_told_in_a_line(run: Path, arguments: tuple[str, ...], words: str) -> None:
    if "--tp" in arguments:
        arguments = tuple(one for one in arguments if one not in ("--nproc", "1"))
        done: Any = subprocess.run(
            [sys.executable, "-m", "megatron_lite", "generate", str(run), *arguments],
            capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        code = done.returncode
    else:
        done = invoke(run, *arguments)
        code = done.exit_code
    assert code == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line


def test_a_line_that_is_no_prompt_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "w5"}\n{"text": "w9"}\n')
    done = invoke(run, "--prompt-file", tmp_path / "a.jsonl")
    assert done.exit_code == 2 and "a.jsonl:2: is not a JSON object" in done.stderr
    (tmp_path / "b.txt").write_bytes(b"caf\xe9\n")
    done = invoke(run, "--prompt-file", tmp_path / "b.txt")
    assert done.exit_code == 2 and "b.txt: is not UTF-8" in done.stderr


def test_a_line_of_a_file_ends_at_its_newline_only(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5\u2028w6\x85"}\n', encoding="utf-8")
    done = invoke(run, "--prompt-file", tmp_path / "prompts.jsonl", "--jsonl", *COMMON)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.split("\n")[0])["prompt"] == "w5\u2028w6\x85"


def test_a_prompt_that_is_no_text_is_refused(run: Path, tmp_path: Path) -> None:
    # Of bytes that are no UTF-8 Python makes such characters in arguments and, in some locales, on stdin.
    done = invoke(run, "--prompt", "caf\udce9", *COMMON)
    assert done.exit_code == 2 and "--prompt: is not UTF-8 at character 3" in done.stderr
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5"}\n{"prompt": "\\ud800"}\n')
    done = invoke(run, "--prompt-file", tmp_path / "prompts.jsonl", *COMMON)
    assert done.exit_code == 2 and "prompts.jsonl 2: is not UTF-8" in done.stderr
    done = invoke(run, "--prompt-file", tmp_path / "none", *COMMON)
    assert done.exit_code == 2 and "No such file or directory; correct the path" in done.stderr


def test_processes_are_started_for_a_layout(run: Path) -> None:
    """tp = 2 starts two processes by itself; what the first prints is what one process prints."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lite", "generate", str(run), "-p", "w5", "-p", "w7", "--tp", "2",
         *map(str, COMMON)],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == invoke(run, "-p", "w5", "-p", "w7", *COMMON).stdout


@pytest.mark.parametrize(("options", "complaint"), [(["--greedy"], "--greedy"), (["--beams", "3"], "--beams 3")])
def test_an_option_that_would_do_nothing_is_refused(tmp_path: Path, options: list[str], complaint: str) -> None:
    done = CliRunner().invoke(app, ["generate", str(tmp_path), "-p", "a", *options, "--top-k", "5", "--top-p", "0.5"])
    assert done.exit_code == 2
    assert f"{complaint} draws nothing, so --top-k and --top-p would do nothing" in done.output
