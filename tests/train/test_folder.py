"""Whose the folder of a run is: what is gone on with, what begins again, and that nothing goes without --overwrite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lite.config import RunConfig, load_config
from megatron_lite.train.folder import (
    RunFolderError,
    Source,
    choose_source,
    continue_folder,
    held_folder,
    is_own_checkpoint,
    make_log_folder,
    prepare_folder,
    refuse_to_go_back,
)
from megatron_lite.utils import run_files
from tests.train.tiny_run import NUM_STEPS, keys, read_metrics


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Of data that is not there: the folder comes first."""
    return load_config(None, keys(tmp_path / "data", tmp_path, "mine"))


def add_checkpoints(folder: Path, *steps: int) -> Path:
    for step in steps:
        file = folder / run_files.CHECKPOINTS / f"step-{step:08d}" / "checkpoint.json"
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    return folder / run_files.CHECKPOINTS


def take_steps(config: RunConfig, last: int, more: str = "") -> Path:
    """A run that took some steps."""
    folder = prepare_folder(config)
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, last + 1)]
    (folder / run_files.METRICS).write_text("".join(lines) + more)
    return folder


@pytest.mark.parametrize("has_empty_metrics", [False, True])
def test_checkpoints_are_kept_whatever_is_beside_them(
    config: RunConfig, tmp_path: Path, has_empty_metrics: bool
) -> None:
    checkpoints = add_checkpoints(tmp_path / "mine", 5)
    if has_empty_metrics:
        (tmp_path / "mine" / run_files.METRICS).touch()
    message = r"mine: holds a run already \(checkpoints is there\); go on with it by --resume auto, add --overwrite"
    with pytest.raises(RunFolderError, match=message):
        choose_source(config, "none", overwrite=False)
    assert choose_source(config, "auto", overwrite=False) == Source(checkpoints, is_checkpoint=False)
    assert choose_source(config, "auto", overwrite=True) is None
    prepare_folder(config)
    assert not checkpoints.exists()


@pytest.mark.parametrize("resume", ["auto", "none"])
@pytest.mark.parametrize("name", [run_files.CONFIG, run_files.PICTURE, run_files.METRICS])
def test_a_file_that_a_run_would_replace_is_kept(config: RunConfig, tmp_path: Path, name: str, resume: str) -> None:
    file = tmp_path / "mine" / name
    file.parent.mkdir()
    file.write_text("the work of a day")
    with pytest.raises(RunFolderError, match=f"{name} is there.*add --overwrite to replace it"):
        choose_source(config, resume, overwrite=False)
    assert file.read_text() == "the work of a day"


def test_what_took_no_step_is_replaced(config: RunConfig, tmp_path: Path) -> None:
    """A run that died while it was built, which is when memory runs out; and one that died before, in the launcher."""
    logs = make_log_folder(tmp_path / "mine")
    folder = prepare_folder(config)
    (folder / run_files.CONFIG).write_text("of the run that died")
    (folder / run_files.UTILISATION).write_text("{}")
    assert choose_source(config, "none", overwrite=False) is None
    assert prepare_folder(config) == folder
    assert "of the run that died" not in (folder / run_files.CONFIG).read_text()
    assert not (folder / run_files.UTILISATION).exists() and logs.exists()


def test_a_run_that_was_cut_off_before_its_first_checkpoint_begins_again(config: RunConfig, tmp_path: Path) -> None:
    take_steps(config, 3, '{"step": 4, "lo')
    assert choose_source(config, "auto", overwrite=False) is None
    with pytest.raises(RunFolderError, match="holds a run already"):
        choose_source(config, "none", overwrite=False)
    other = load_config(None, keys(tmp_path / "data", tmp_path, "mine", "train.seed=7"))
    with pytest.raises(RunFolderError, match="holds a run already"):
        choose_source(other, "auto", overwrite=False)


def test_a_run_that_has_ended_without_checkpoints_is_kept(config: RunConfig) -> None:
    take_steps(config, NUM_STEPS)
    with pytest.raises(RunFolderError, match=r"metrics.jsonl is there\); add --overwrite"):
        choose_source(config, "auto", overwrite=False)


def test_a_path_is_a_checkpoint_or_a_folder_of_them_or_a_run(config: RunConfig, tmp_path: Path) -> None:
    other = add_checkpoints(tmp_path / "other", 5, 10)
    for path, source in (
        (other, Source(other, is_checkpoint=False)),
        (other.parent, Source(other, is_checkpoint=False)),
        (other / "step-00000005", Source(other / "step-00000005", is_checkpoint=True)),
    ):
        assert choose_source(config, str(path), overwrite=False) == source
    for path, message in ((tmp_path / "none", "does not exist"), (take_steps(config, 2), "has no checkpoints")):
        with pytest.raises(RunFolderError, match=f"{message}; name a checkpoint, such as runs/NAME/checkpoints/step-"):
            choose_source(config, str(path), overwrite=False)
    with pytest.raises(RunFolderError, match="mine: holds a run already"):
        choose_source(config, str(other), overwrite=False)
    assert choose_source(config, str(other), overwrite=True) == Source(other, is_checkpoint=False)


def test_going_back_removes_what_came_later_only_when_asked(config: RunConfig, tmp_path: Path) -> None:
    take_steps(config, 12)
    own = add_checkpoints(tmp_path / "mine", 4, 8, 12)
    with pytest.raises(RunFolderError, match="later checkpoints than step-00000004: step-00000008, step-00000012; add"):
        refuse_to_go_back(config, own / "step-00000004", 4)
    refuse_to_go_back(config, own / "step-00000012", 12)
    assert choose_source(config, str(own / "step-00000012"), overwrite=False) is not None
    assert choose_source(config, str(own / "step-00000004"), overwrite=True) is not None
    continue_folder(config, 4, overwrite=True)
    assert [path.name for path in own.iterdir()] == ["step-00000004"]
    assert [record["step"] for record in read_metrics(tmp_path / "mine")] == [1, 2, 3, 4]


def test_a_run_that_goes_on_cuts_its_metrics_and_puts_damaged_checkpoints_aside(
    config: RunConfig, tmp_path: Path
) -> None:
    folder = take_steps(config, 7, '{"step": 8, "lo')
    with (folder / run_files.METRICS).open("ab") as file:
        file.write(b"\xff\n\0\n[1]\n")
    own = add_checkpoints(folder, 4, 8)
    (folder / run_files.CONFIG).write_text("old")
    (folder / run_files.PICTURE).write_text("stays until it is drawn anew")
    for _ in range(2):
        continue_folder(config, 4, overwrite=False)
        assert sorted(path.name for path in own.iterdir()) == ["step-00000004", "step-00000008.damaged"]
        assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4]
        add_checkpoints(folder, 8)
    assert load_config(folder / run_files.CONFIG) == config
    assert (folder / run_files.PICTURE).exists()
    assert not list(folder.glob("*.tmp")), "cut atomically, and nothing is left of it"


def move_away(checkpoints: Path, to: Path) -> None:
    """To another disk, with a link where it was."""
    to.parent.mkdir(exist_ok=True)
    checkpoints.rename(to)
    checkpoints.symlink_to(to)


def test_a_checkpoint_is_a_runs_own_by_its_place_and_through_links(config: RunConfig, tmp_path: Path) -> None:
    """A run that took a checkpoint of its own for another run's would remove everything."""
    take_steps(config, 8)
    own, other = add_checkpoints(tmp_path / "mine", 4, 8), add_checkpoints(tmp_path / "other", 4)
    move_away(own / "step-00000008", tmp_path / "disk" / "moved")
    (tmp_path / "link").symlink_to(own / "step-00000004")
    for path in (own / "step-00000004", own / "step-00000008", tmp_path / "link"):
        assert is_own_checkpoint(config, path)
        assert choose_source(config, str(path), overwrite=False) == Source(path, is_checkpoint=True)
    for path in (other / "step-00000004", tmp_path / "disk" / "moved"):
        assert not is_own_checkpoint(config, path)
        with pytest.raises(RunFolderError, match="holds a run already"):
            choose_source(config, str(path), overwrite=False)
    continue_folder(config, 4, overwrite=True)
    assert [path.name for path in own.iterdir()] == ["step-00000004"], "the link is gone"
    assert (tmp_path / "disk" / "moved" / "checkpoint.json").exists(), "and not what it leads to"


def test_a_link_to_a_folder_of_checkpoints_stays(config: RunConfig, tmp_path: Path) -> None:
    take_steps(config, 4)
    own = add_checkpoints(tmp_path / "mine", 4)
    move_away(own, tmp_path / "disk" / "all")
    (own / ".step-00000008.partial").mkdir()
    (own / "not-ours").touch()
    prepare_folder(config)
    assert own.is_symlink() and [path.name for path in own.iterdir()] == ["not-ours"]


def test_two_jobs_do_not_share_a_folder(config: RunConfig) -> None:
    refused = "mine: another job trains there now; wait until it ends, or stop it, or choose run.name=ANOTHER"
    with held_folder(config), pytest.raises(RunFolderError, match=refused), held_folder(config, wait_s=0.2):
        pass
    with held_folder(config, wait_s=0):
        pass
