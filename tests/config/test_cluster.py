"""Cluster files: each one loads and is plausible, errors name key and remedy, and plan and an install read them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

from megatron_lite.cli import app
from megatron_lite.config import ConfigError
from megatron_lite.config.cluster import ClusterConfig, cluster_names, load_cluster
from megatron_lite.config.peaks import GPU_PEAKS_TFLOPS, gpu_peaks_tflops
from megatron_lite.utils.memory import parse_bytes

ROOT = Path(__file__).parents[2]
RUN = ROOT / "configs/runs/llama3-8b-64xa100.yaml"
NODE = {
    "gpus_per_node": 0,
    "memory_bandwidth_gb_s": 40,
    "network_gb_s": 0.5,
    "network_latency_us": 30,
    "cores_per_node": 4,
    "host_memory_gib": 16,
}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "mine.yaml"
    keys = {key: value for key, value in {**NODE, **changes}.items() if value is not None}
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
    return path


def test_the_names_are_the_files() -> None:
    assert {"dgx-a100", "a100-40gb", "h100", "cpu"} <= set(cluster_names())
    assert set(cluster_names()) == {path.stem for path in (ROOT / "configs/clusters").iterdir()}


@pytest.mark.parametrize("name", cluster_names())
def test_a_cluster_is_plausible(name: str) -> None:
    """A slip of a unit (Gb for GB, MiB for GiB) is a factor of 8 or 1000."""
    cluster = load_cluster(name)
    assert cluster.name == name and load_cluster(ROOT / f"configs/clusters/{name}.yaml") == cluster
    assert 1 <= cluster.host_memory_gib / cluster.cores_per_node <= 64
    assert 0.1 <= cluster.network_gb_s <= 1000 and 0.5 <= cluster.network_latency_us <= 500
    if not cluster.gpus_per_node:
        assert cluster.device == "cpu" and cluster.peak_tflops.bf16 is None
        return
    assert cluster.device == "cuda" and cluster.gpu_memory_gib is not None and cluster.nvlink_gb_s is not None
    assert 10 <= cluster.gpu_memory_gib <= 300
    assert cluster.network_gb_s / cluster.gpus_per_node < cluster.nvlink_gb_s < cluster.memory_bandwidth_gb_s
    peaks = cluster.peak_tflops
    assert peaks.fp32 and peaks.bf16 and peaks.fp32 < peaks.bf16 == peaks.fp16


def test_the_peaks_are_those_of_the_table() -> None:
    assert load_cluster("dgx-a100").peak_tflops.bf16 == 312 and load_cluster("h100").peak_tflops.bf16 == 989.4
    assert gpu_peaks_tflops("NVIDIA A100-SXM4-80GB") == {"fp32": 19.5, "bf16": 312, "fp16": 312, "fp64": 19.5}
    assert gpu_peaks_tflops("NVIDIA H100 PCIe")["bf16"] == 756
    assert gpu_peaks_tflops("of tomorrow") == {}
    longer = [part for position, (part, _) in enumerate(GPU_PEAKS_TFLOPS) for other, _ in GPU_PEAKS_TFLOPS[:position]
              if other in part]  # fmt: skip
    assert not longer, "a shorter name before a longer one takes its place"


def test_peaks_of_a_gpu_that_is_in_no_table(tmp_path: Path) -> None:
    path = write(tmp_path, gpus_per_node=2, gpu="of tomorrow", gpu_memory_gib=500, peak_tflops={"bf16": 9000})
    assert load_cluster(path).peak_tflops.bf16 == 9000


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_cluster("cpu").cores_per_node = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "key", "mentions"),
    [
        ({"network_gb_s": None}, "network_gb_s", "is required"),
        ({"network_gb_s": 0}, "network_gb_s", "must be a number > 0"),
        ({"cores_per_node": "many"}, "cores_per_node", "must be an integer >= 1"),
        ({"netwrok_gb_s": 3}, "netwrok_gb_s", "did you mean network_gb_s?"),
        ({"peak_tflops": {"bf61": 3}}, "peak_tflops.bf61", "did you mean bf16?"),
        ({"gpus_per_node": 8}, "gpus_per_node", "needs gpu: name of a GPU"),
        ({"gpu": "A100"}, "gpus_per_node", "leave it out"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, changes: dict[str, object], key: str, mentions: str) -> None:
    load_cluster(write(tmp_path))  # it is the change that is wrong
    with pytest.raises(ConfigError) as caught:
        load_cluster(write(tmp_path, **changes))
    (problem,) = caught.value.problems
    assert problem.key == key and mentions in str(problem) and "mine.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "mentions"),
    [
        ("dgx-a10", "did you mean dgx-a100?"),
        ("somewhere/none.yaml", "there is no such file"),
        ("xyz", "there are a100-40gb, cpu, dgx-a100, h100"),
    ],
)
def test_a_cluster_that_is_not_there(name: str, mentions: str) -> None:
    with pytest.raises(ConfigError, match="1 problem in --cluster") as caught:
        load_cluster(name)
    assert mentions in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "", "cores_per_node: 1\ncores_per_node: 2\n"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_cluster(path)


def test_what_a_group_may_reach() -> None:
    """Against the figures by hand, of 8 GPUs with 300 GB/s of NVLink each and 200 GB/s of ports together."""
    a100 = load_cluster("dgx-a100")
    assert a100.bandwidth_gb_s(group_on_node=8, all_on_node=8, crosses_nodes=False) == 300
    assert a100.bandwidth_gb_s(group_on_node=1, all_on_node=8, crosses_nodes=True) == 25
    assert a100.bandwidth_gb_s(group_on_node=4, all_on_node=8, crosses_nodes=True) == 100
    assert a100.bandwidth_gb_s(group_on_node=8, all_on_node=8, crosses_nodes=True) == 200
    slow = a100.model_copy(update={"nvlink_gb_s": 50.0})
    assert slow.bandwidth_gb_s(group_on_node=8, all_on_node=8, crosses_nodes=True) == 50
    assert load_cluster("cpu").bandwidth_gb_s(group_on_node=2, all_on_node=2, crosses_nodes=False) is None


def plan(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments), "--memory"], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_plan_takes_the_world_and_the_limit_of_a_cluster() -> None:
    code, output = plan(RUN, "--cluster", "dgx-a100", "--nodes", 8, "--json")
    account = json.loads(output)
    assert code == 0 and account["world_size"] == 64 and account["device"] == "cuda"
    assert account["limit"] == int(load_cluster("dgx-a100").gpu_memory_gib * 2**30)  # type: ignore[operator]
    by_hand = json.loads(plan(RUN, "--world", 64, "--limit", "79.1GiB", "--json")[1])
    assert by_hand["stages"] == account["stages"]
    of_a_user = json.loads(plan(RUN, "--cluster", "dgx-a100", "--limit", "5GiB", "--json")[1])
    assert of_a_user["limit"] == parse_bytes("5GiB")


def test_what_fits_80_gb_need_not_fit_40() -> None:
    bigger = (
        ROOT / "configs/runs/llama3-8b-8xa100.yaml",
        "train.micro_batch_size=8",
        "parallel.recompute=none",
        "--nodes",
        1,
    )
    codes = [plan(*bigger, "--cluster", name)[0] for name in ("dgx-a100", "a100-40gb")]
    assert codes == [0, 1]


def test_processes_share_the_memory_of_a_node_without_gpus(tmp_path: Path) -> None:
    path = write(tmp_path, host_memory_gib=16)
    quickstart = ROOT / "configs/runs/quickstart.yaml"
    limits = [
        json.loads(plan(quickstart, "--cluster", path, "--nodes", nodes, "--world", 8, "--json")[1])["limit"]
        for nodes in (1, 2)
    ]
    assert limits == [2 << 30, 4 << 30]
    assert json.loads(plan(quickstart, "--cluster", path, "--json")[1])["device"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (("--nodes", 2), "name it with --cluster"),
        (("--cluster", "dgx-a100", "--nodes", 8, "--world", 32), "have 64 GPUs"),
        (("--cluster", "dgx-a10"), "did you mean dgx-a100?"),
        (("--cluster", "dgx-a100", "--nodes", 3, "parallel.tp=7"), "parallel.tp"),
    ],
)
def test_what_plan_refuses(arguments: tuple[object, ...], mentions: str) -> None:
    code, output = plan(RUN, *arguments)
    assert code == 2 and mentions in output


def test_utilisation_takes_the_same_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace
    from typing import Any

    from megatron_lite.train import utilisation

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(utilisation.collectives, "all_reduce", lambda tensor, axis, op="sum": tensor.cpu())
    monkeypatch.setattr(utilisation, "_measure", lambda mesh, dtype: 1.0)
    monkeypatch.setattr(torch, "tensor", lambda values, dtype, device: torch.as_tensor(values, dtype=dtype))
    mesh: Any = SimpleNamespace(device=torch.device("cuda", 0), world=None)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        peak = utilisation.find_peak(mesh, dtype)
        assert peak.source == "data sheet"
        assert peak.total_flops_per_s == getattr(load_cluster("a100-40gb").peak_tflops, name) * 1e12
    assert utilisation.find_peak(mesh, torch.int8).source == "measured matmul"


def test_an_install_has_the_files(tmp_path: Path) -> None:
    """What setup.py puts into the package, found as an install finds it: without a checkout around it."""
    build = ["setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True, timeout=120)
    code = (
        "from megatron_lite.config.cluster import load_cluster; from megatron_lite.config.shipped import shipped; "
        "print(load_cluster('dgx-a100').gpus_per_node, shipped('launch/test.sh'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["8", str(tmp_path / "megatron_lite/_shipped/launch/test.sh")], done.stderr
    missing = "from megatron_lite.config.shipped import shipped; shipped('launch/none.sh')"
    failed = subprocess.run([sys.executable, "-c", missing], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
                            capture_output=True, text=True)  # fmt: skip
    assert "reinstall it" in failed.stderr


def test_every_key_is_described() -> None:
    assert all(field.description for field in ClusterConfig.model_fields.values())
