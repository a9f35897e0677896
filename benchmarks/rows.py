"""The comparisons: which layout, with which microbatches, against which peer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

from benchmarks.workloads import Dtype, GradDtype, Job, Workload

OURS = "ours"


@dataclass(frozen=True)
class Row:
    """One layout in one precision, in the same microbatches for ours and for `peers`, modules of benchmarks/peers."""

    name: str
    dtype: Dtype
    peers: tuple[str, ...]
    num_microbatches: int
    tp: int = 1
    pp: int = 1
    dp: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    zero_stage: int = 1
    keeps_parameters: bool = False
    grad_dtype: GradDtype = "fp32"
    default: bool = True

    @property
    def contenders(self) -> tuple[str, ...]:
        return (OURS, *(f"peers.{peer}" for peer in self.peers))

    def job(self, contender: str, workload: Workload, weights: str, cores: int) -> Job:
        """All processes together use `cores` threads, at least one each."""
        per_step = workload.batch_size // self.dp
        world_size = self.tp * self.pp * self.dp
        return Job(
            contender=contender,
            workload=workload.name,
            dtype=self.dtype,
            micro_batch_size=per_step // self.num_microbatches,
            threads=max(1, cores // world_size),
            weights=weights,
            tp=self.tp,
            pp=self.pp,
            dp=self.dp,
            schedule=self.schedule,
            virtual_stages=self.virtual_stages,
            zero_stage=self.zero_stage,
            keeps_parameters=self.keeps_parameters,
            grad_dtype=self.grad_dtype,
        )


def _all_rows() -> Iterator[Row]:
    dtypes: tuple[Dtype, ...] = ("fp32", "bf16")
    for dtype in dtypes:
        yield Row(f"single-{dtype}", dtype, ("transformers_llama",), 4)
    for dtype in dtypes:
        yield Row(f"tp2-{dtype}", dtype, ("dtensor_tp",), 4, tp=2)
    for dtype in dtypes:
        for num_microbatches in (4, 8):
            yield Row(f"pp2-m{num_microbatches}-{dtype}", dtype, ("torch_pipelining",), num_microbatches, pp=2)
    for dtype in dtypes:
        for schedule, virtual_stages in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-v", 2)):
            name, peers = f"pipeline-{dtype}-{schedule}", ("torch_pipelining",)
            yield Row(name, dtype, peers, 8, pp=2, schedule=schedule, virtual_stages=virtual_stages, default=False)
    for dtype in dtypes:
        yield Row(f"dp2-{dtype}", dtype, ("ddp_zero",), 2, dp=2, default=False)
    for dtype in dtypes:
        yield from _zero_rows(dtype)
    for dtype in dtypes:
        yield Row(f"plain-{dtype}", dtype, ("plain_torch", "transformers_llama"), 4, default=False)
    for dtype in dtypes:
        yield Row(f"compiled-{dtype}", dtype, ("compiled_torch",), 4, default=False)


def _zero_rows(dtype: Dtype) -> Iterator[Row]:
    """Stages 1, 2 and 3 on two and four ranks, one microbatch a step; and what else changes a stage's work."""
    for dp in (2, 4):
        for stage in (1, 2, 3):
            name = f"zero-{dtype}-dp{dp}-stage{stage}"
            row = Row(name, dtype, ("deepspeed", "fsdp2"), 1, dp=dp, zero_stage=stage, default=False)
            yield row
            if dtype == "bf16":
                yield replace(row, name=f"{name}-param", grad_dtype="param")
            if stage == 3:
                yield replace(row, name=f"{name}-keep", keeps_parameters=True)
            if dp == 2:
                yield replace(row, name=f"{name}-m4", num_microbatches=4)


ROWS = {row.name: row for row in _all_rows()}


def select(names: str) -> list[Row]:
    """Rows of a comma-separated list of names or beginnings of names; '' gives the default rows, 'all' all of them.

    A whole name is that row, and not also those whose names go on.

    Raises ValueError for a word that no row begins with.
    """
    if not names:
        return [row for row in ROWS.values() if row.default]
    words = ["" if word.strip() == "all" else word.strip() for word in names.split(",") if word.strip()]
    for word in words:
        if not any(name.startswith(word) for name in ROWS):
            raise ValueError(f"--rows: no row begins with {word!r}; there are: {', '.join(ROWS)} (or 'all')")
    return [
        row
        for row in ROWS.values()
        if row.name in words or any(row.name.startswith(word) for word in words if word not in ROWS)
    ]


# Packages of contenders that `pip install 'megatron-lite[test]'` does not bring.
EXTRA_PACKAGES = {"peers.deepspeed": "deepspeed"}


def require(contenders: list[str]) -> None:
    """Raise ValueError if a contender has no module or lacks its package, before minutes go into the others."""
    for contender in contenders:
        package = EXTRA_PACKAGES.get(contender)
        if package is not None and find_spec(package) is None:
            raise ValueError(
                f"contender {contender!r} needs the package {package}: DS_BUILD_OPS=0 pip install "
                f"'megatron-lite[benchmark]'; --without {contender.removeprefix('peers.')} measures the others"
            )
        if find_spec(f"benchmarks.{contender}") is None:
            path = f"benchmarks/{contender.replace('.', '/')}.py"
            raise ValueError(f"contender {contender!r}: {path} does not exist; --only peers measures the peers alone")
