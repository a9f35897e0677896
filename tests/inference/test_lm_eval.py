"""The adapter to lm-eval, against lm-eval's own `hf` on the same folder: tasks of each kind, without network."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerError, WorkerPool
from megatron_lite.inference.eval_run import load_runner
from megatron_lite.inference.source import open_source
from megatron_lite.inference.stage import choose_layout
from megatron_lite.inference.tasks import run_tasks
from tests.inference.local_tasks import TASKS, make_tasks
from tests.inference.tiny_models import MAX_SEQ_LEN, make_folder

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate", reason="lm-eval's own hf model needs it")

LAYOUTS = {"single": (1, 1, 1), "tp2-pp2-dp2": (2, 2, 8)}
BOUND = 1e-5  # relative, of sums of log-probabilities in float32


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, and the caches of data sets in a folder of the test; the processes of the pool are not told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, offline: None) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def expected(folder: Path, tasks: Path) -> dict[str, Any]:
    """What lm-eval finds with its own model."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(str(folder), device="cpu", dtype="float32", batch_size=8, max_length=MAX_SEQ_LEN)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    assert results is not None
    return results


def tasks_job(folder: Path, tasks: Path, layout: str, names: tuple[str, ...], cache: Path, limit: int | None) -> Any:
    """The results of the first rank."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache
    tp, pp, world_size = LAYOUTS[layout]
    source = open_source(folder)
    mesh = build_mesh(choose_layout(source.model, tp=tp, pp=pp, world_size=world_size), device=torch.device("cpu"))
    runner = load_runner(source, mesh, "float32")
    return run_tasks(source, runner, names, seq_len=MAX_SEQ_LEN, tasks_dir=tasks, limit=limit)


def found_by(
    pool: WorkerPool, folder: Path, tasks: Path, layout: str, cache: Path, names: tuple[str, ...] = tuple(TASKS)
) -> Any:
    first, *others = pool.run(tasks_job, LAYOUTS[layout][2], folder, tasks, layout, names, cache, None)
    assert not any(others)
    return first


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_numbers_of_lm_eval(
    pool: WorkerPool, folder: Path, tasks: Path, expected: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    found = found_by(pool, folder, tasks, layout, tmp_path)
    for task in TASKS:
        theirs, ours = (results["samples"][task] for results in (expected, found))
        assert len(ours) == len(theirs) > 0
        for one, other in zip(theirs, ours, strict=True):
            assert one["doc"] == other["doc"] and one["arguments"] == other["arguments"]
            _same_responses(one["resps"], other["resps"])
        for metric, value in expected["results"][task].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert found["results"][task][metric] == pytest.approx(value, rel=BOUND), (task, metric)


def _same_responses(theirs: Any, ours: Any) -> None:
    if isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=BOUND)
    elif isinstance(theirs, str | bool):
        assert ours == theirs
    else:
        assert len(theirs) == len(ours)
        for one, other in zip(theirs, ours, strict=True):
            _same_responses(one, other)


@pytest.mark.slow
def test_the_answers_are_not_all_alike(expected: dict[str, Any]) -> None:
    """Negative control: equal results of a model that always says the same would show little."""
    samples = expected["samples"]
    choices = {tuple(round(value, 3) for (value, _), *_ in sample["resps"]) for sample in samples["ml_choice"]}
    texts = {sample["resps"][0][0] for sample in samples["ml_generate"]}
    assert len(choices) > 10 and len(texts) > 2
    long = max(samples["ml_rolling"], key=lambda sample: len(sample["doc"]["text"]))
    assert len(long["doc"]["text"]) > 4 * MAX_SEQ_LEN


@pytest.mark.slow
def test_an_unknown_task_ends_every_rank(pool: WorkerPool, folder: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"ml_choise is no task of lm-eval; did you mean ml_choice"):
        found_by(pool, folder, tasks, "tp2-pp2-dp2", tmp_path, ("ml_rolling", "ml_choise"))


def test_the_package_does_without_lm_eval() -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None; "
        "import megatron_lite.cli.eval, megatron_lite.inference.eval_run, megatron_lite.inference.tasks; "
        "assert not {'datasets', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
