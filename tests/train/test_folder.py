"""Whose the folder of a run is: nothing that a run would replace goes without --overwrite."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.config import RunConfig, load_config
from megatron_lite.train.folder import RunFolderError, make_log_folder, prepare_folder
from megatron_lite.utils import run_files
from tests.train.tiny_run import keys


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Of data that is not there: the folder comes first."""
    return load_config(None, keys(tmp_path / "data", tmp_path, "mine"))


def add_weights(folder: Path) -> Path:
    file = folder / run_files.WEIGHTS / "weights.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    return file


@pytest.mark.parametrize("has_empty_metrics", [False, True])
def test_weights_are_kept_whatever_is_beside_them(config: RunConfig, tmp_path: Path, has_empty_metrics: bool) -> None:
    weights = add_weights(tmp_path / "mine")
    if has_empty_metrics:
        (tmp_path / "mine" / run_files.METRICS).touch()
    with pytest.raises(RunFolderError, match=r"mine: holds a run already \(weights is there\); add --overwrite"):
        prepare_folder(config, overwrite=False)
    assert weights.exists()
    prepare_folder(config, overwrite=True)
    assert not weights.parent.exists()


@pytest.mark.parametrize("name", [run_files.CONFIG, run_files.PICTURE, run_files.METRICS])
def test_a_file_that_a_run_would_replace_is_kept(config: RunConfig, tmp_path: Path, name: str) -> None:
    file = tmp_path / "mine" / name
    file.parent.mkdir()
    file.write_text("the work of a day")
    with pytest.raises(RunFolderError, match=f"{name} is there"):
        prepare_folder(config, overwrite=False)
    assert file.read_text() == "the work of a day"


def test_what_took_no_step_is_replaced(config: RunConfig, tmp_path: Path) -> None:
    """A run that died while it was built, which is when memory runs out; and one that died before, in the launcher."""
    logs = make_log_folder(tmp_path / "mine")
    folder = prepare_folder(config, overwrite=False)
    (folder / run_files.CONFIG).write_text("of the run that died")
    (folder / run_files.UTILISATION).write_text("{}")
    assert prepare_folder(config, overwrite=False) == folder
    assert "of the run that died" not in (folder / run_files.CONFIG).read_text()
    assert not (folder / run_files.UTILISATION).exists() and logs.exists()
