"""The documentation says what is so: its links lead somewhere, its commands exist, its table of keys is the schema's.

`python tests/test_docs.py` writes the table of keys anew.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from megatron_lite.cli import app
from megatron_lite.config import key_help, load_config
from megatron_lite.config.keys import leaf_fields

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS_PAGE = ROOT / "docs" / "configuration.md"
BEGIN, END = "<!-- keys: written by tests/test_docs.py -->\n", "<!-- end of keys -->\n"


def key_tables() -> str:
    """One table a section of the schema."""
    lines: list[str] = []
    section = ""
    for entry in key_help():
        if entry.key.partition(".")[0] != section:
            section = entry.key.partition(".")[0]
            lines += ["", f"### {section}", "", "| key | takes | default | |", "|---|---|---|---|"]
        cells = (f"`{entry.key}`", entry.type, f"`{entry.default}`" if entry.default else "", entry.description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n\n"


def with_key_tables(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + key_tables() + END + after


def links(text: str) -> Iterator[str]:
    """Targets of the links and images of a page, without those that leave the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text):
        path = (target[0] or target[1]).partition("#")[0]
        if path and not path.startswith(("http://", "https://", "mailto:")):
            yield path


def broken_links(page: Path, text: str) -> list[str]:
    return [target for target in links(text) if not (page.parent / target).exists()]


def commands(text: str) -> Iterator[list[str]]:
    """The command lines of a page's shell blocks."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def unknown_words(words: list[str]) -> list[str]:
    """What a command names and the repository does not have: a command of ours, a script, a config, a config key."""
    unknown = []
    if words[0] in ("megatron-lite", ".venv/bin/megatron-lite"):
        ours = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        if words[1] not in ours:
            unknown.append(words[1])
        else:
            options = {option for parameter in ours[words[1]].params for option in parameter.opts}
            unknown += [word for word in words if word.startswith("--") and word not in options]
    for word in words[1:]:
        if word.startswith(("launch/", "configs/", "tests", "benchmarks/")) and not (ROOT / word).exists():
            unknown.append(word)
        key, equals, _ = word.partition("=")
        if equals and re.fullmatch(r"[a-z]+\.[a-z_]+", key) and key not in leaf_fields():
            unknown.append(word)
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        assert unknown_words(words) == [], shlex.join(words)


def test_the_readme_shows_its_two_commands() -> None:
    shown = list(commands((ROOT / "README.md").read_text(encoding="utf-8")))
    assert ["bash", "launch/quickstart.sh"] in shown and ["bash", "launch/test.sh"] in shown


def test_the_table_of_keys_is_up_to_date() -> None:
    page = KEYS_PAGE.read_text(encoding="utf-8")
    assert BEGIN in page and END in page
    assert page == with_key_tables(page), "run python tests/test_docs.py"
    assert all(f"| `{key}` |" in page for key in leaf_fields())


def test_configs_in_the_documentation_load(tmp_path: Path) -> None:
    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    ]
    assert blocks
    for number, block in enumerate(blocks):
        path = ROOT / "configs" / "runs"  # paths of models in a config are relative to its folder
        config = tmp_path / f"{number}.yaml"
        config.write_text(block.replace("../models/", f"{path.parent / 'models'}/"), encoding="utf-8")
        load_config(config)


def test_controls() -> None:
    """Negative controls: what is wrong is found."""
    assert broken_links(ROOT / "README.md", "[a](docs/none.md) [b](https://example.com) [c](LICENSE)") == [
        "docs/none.md"
    ]
    wrong = "```bash\nmegatron-lite trane configs/runs/none.yaml modle.x=1 model.hiden=2 # comment\n```"
    (words,) = commands(wrong)
    assert unknown_words(words) == ["trane", "configs/runs/none.yaml", "modle.x=1", "model.hiden=2"]
    assert unknown_words(["megatron-lite", "train", "--fast"]) == ["--fast"]
    page = KEYS_PAGE.read_text(encoding="utf-8")
    assert with_key_tables(page.replace("| `optim.lr` |", "| `optim.rate` |")) == page


if __name__ == "__main__":
    KEYS_PAGE.write_text(with_key_tables(KEYS_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
