"""What a cluster is made of: the facts that the planner, the launchers and the doctor read.

A file under configs/clusters states them for one kind of node, with the source of each; `load_cluster` finds it by
name. A bandwidth counts one direction: a data sheet that says 600 GB/s of NVLink adds up the two.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from megatron_lite.config.keys import describe, with_article
from megatron_lite.config.peaks import gpu_peaks_tflops
from megatron_lite.config.problems import ABSENT, ConfigError, Problem
from megatron_lite.config.section import Section, derived
from megatron_lite.config.shipped import shipped, shipped_files
from megatron_lite.config.yaml_text import parse

FOLDER = "configs/clusters"


class PeakTflops(Section):
    """Dense operations of one GPU, 10^12 a second, by the dtype of the factors of a matrix product."""

    fp32: float | None = Field(default=None, gt=0, description="without TF32")
    bf16: float | None = Field(default=None, gt=0, description="on tensor cores, without sparsity")
    fp16: float | None = Field(default=None, gt=0, description="on tensor cores, without sparsity")
    fp64: float | None = Field(default=None, gt=0, description="on tensor cores where there are such")


class ClusterConfig(Section):
    """One kind of node, and the network between nodes. ``name`` is that of the file."""

    name: str = Field(min_length=1, description="what the cluster is called; by default the name of its file")
    gpu: str | None = Field(
        default=None, min_length=1, description="name of a GPU as CUDA gives it, or a part of it; null: no GPUs"
    )
    gpus_per_node: int = Field(ge=0, description="number of GPUs in a node")
    gpu_memory_gib: float | None = Field(default=None, gt=0, description="memory of one GPU that programs may use, GiB")
    peak_tflops: PeakTflops = derived(
        "those of the data sheet, for a known gpu",
        lambda data: PeakTflops(**gpu_peaks_tflops(data["gpu"] or "")),
        description="dense operations of one GPU, 10^12 a second; of a CPU nothing is promised, it is measured",
    )
    memory_bandwidth_gb_s: float = Field(gt=0, description="of one GPU's memory; without GPUs of the node's, GB/s")
    nvlink_gb_s: float | None = Field(
        default=None, gt=0, description="NVLink between the GPUs of a node, of one GPU, one direction, GB/s"
    )
    network_gb_s: float = Field(gt=0, description="of one node to others, all its ports, one direction, GB/s")
    network_latency_us: float = Field(gt=0, description="of a small message between two nodes, microseconds")
    cores_per_node: int = Field(ge=1, description="CPU cores of a node, without hyperthreads")
    host_memory_gib: float = Field(gt=0, description="main memory of a node, GiB")
    network_interface: str | None = Field(
        default=None,
        min_length=1,
        description="names of the network interfaces between nodes, as a pattern such as ib* or ens5",
    )

    @model_validator(mode="after")
    def _gpus_are_described(self) -> ClusterConfig:
        described = {"gpu": self.gpu, "gpu_memory_gib": self.gpu_memory_gib}
        for key, value in described.items():
            if self.gpus_per_node and value is None:
                raise ValueError(f"needs {key}: {type(self).model_fields[key].description}")
            if not self.gpus_per_node and value is not None:
                raise ValueError(f"goes without {key}, which describes a GPU: leave it out, or say how many there are")
        return self

    @property
    def device(self) -> str:
        """What ranks compute on here: 'cuda' or 'cpu'."""
        return "cuda" if self.gpus_per_node else "cpu"

    @property
    def link_gb_s(self) -> float:
        """What one rank may send to one on another node: its GPU's share of the ports; without GPUs all of them."""
        return self.network_gb_s / max(1, self.gpus_per_node)

    def memory_of_rank_gib(self, all_on_node: int) -> float:
        """Memory of the device of one rank: its GPU's, or what it has of the node's beside the others on it."""
        return self.gpu_memory_gib or self.host_memory_gib / all_on_node

    def bandwidth_gb_s(self, *, group_on_node: int, all_on_node: int, crosses_nodes: bool) -> float | None:
        """What a group may reach in an all-reduce (bus bandwidth) while all groups like it use the node; None: unknown.

        group_on_node, all_on_node: ranks of the group, and of the run, on one node. Inside a node NVLink carries it. A
        group that crosses nodes has its ranks' share of the node's ports, and no more than NVLink gives a GPU where
        its ranks pass the sums on.
        """
        if not crosses_nodes:
            return self.nvlink_gb_s
        share = self.network_gb_s * group_on_node / max(group_on_node, all_on_node)
        return min(share, self.nvlink_gb_s) if group_on_node > 1 and self.nvlink_gb_s else share


def cluster_names() -> list[str]:
    """The clusters that come with this package."""
    return [path.stem for path in shipped_files(FOLDER, "*.yaml")]


def load_cluster(name_or_path: str | Path) -> ClusterConfig:
    """The cluster of a name (`cluster_names`) or of a YAML file.

    Raises `ConfigError`: there is none of the name, the file is not YAML, or what is wrong with its keys.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        names = cluster_names()
        if str(name_or_path) not in names:
            near = difflib.get_close_matches(str(name_or_path), names, n=1, cutoff=0.4)
            remedy = f"did you mean {near[0]}? " if near else ""
            remedy += f"there are {', '.join(names)}; or give the path of a YAML file"
            raise ConfigError([Problem("cluster", str(name_or_path), "is not known", remedy)], "--cluster")
        path = shipped(f"{FOLDER}/{name_or_path}.yaml")
    try:
        document = parse(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError([Problem("", ABSENT, f"is not YAML: {error}")], str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        said = "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        remedy = f"name a YAML file, or one of {', '.join(cluster_names())}"
        raise ConfigError([Problem("cluster", str(path), said, remedy)], "--cluster") from None
    problems = [
        Problem(twice.key, ABSENT, f"is given twice, on lines {twice.first_line} and {twice.line}", "keep one")
        for twice in document.duplicates
    ]
    if not isinstance(document.value, dict):
        problems.append(Problem("", ABSENT, "must be a mapping of keys", "the files of configs/clusters are examples"))
    if problems:
        raise ConfigError(problems, str(path))
    try:
        return ClusterConfig.model_validate({"name": path.stem} | document.value)
    except ValidationError as error:
        found = [_problem(item) for item in error.errors(include_url=False)]
        raise ConfigError([problem for problem in found if problem is not None], str(path)) from None


def _problem(item: Any) -> Problem | None:
    """One of pydantic's errors in the words of a config's errors; None for one that follows from another."""
    keys = [str(part) for part in item["loc"]]
    key = ".".join(keys)
    if item["type"] == "default_factory_not_called":
        return None
    section = PeakTflops if keys[:1] == ["peak_tflops"] and len(keys) > 1 else ClusterConfig
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], section.model_fields, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(section.model_fields)}"
        return Problem(key, item["input"], "is not a key", remedy)
    if not keys:
        return Problem("gpus_per_node", item["input"]["gpus_per_node"], item["msg"].removeprefix("Value error, "))
    field = section.model_fields[keys[-1]]
    value = ABSENT if item["type"] == "missing" else item["input"]
    rule = "is required" if value is ABSENT else f"must be {with_article(describe(field))}"
    return Problem(key, value, rule, f"it is: {field.description}")
