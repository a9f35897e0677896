"""The keys of the layout over processes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_lite.config.schedules import SCHEDULE_RULES, ScheduleRule
from megatron_lite.config.section import LayerCounts, NameOrPath, OneOrMany, Section, derived

Recompute = Literal["none", "selective", "full"]

_USUAL = ", ".join(
    f"{rule.usual_virtual_stages} with {name}" for name, rule in SCHEDULE_RULES.items() if rule.usual_virtual_stages
)
_FILE_RULE = ScheduleRule("read from a file, which says itself what it needs", virtual_stages=(1, None))


def schedule_rule(schedule: str) -> ScheduleRule:
    """What a schedule asks of a layout. One that comes from a file is judged when the file is read."""
    return SCHEDULE_RULES.get(schedule, _FILE_RULE)


class ParallelConfig(Section):
    """The layout. It changes where numbers are computed, never which numbers."""

    tp: int = Field(default=1, ge=1, description="tensor-parallel size, processes")
    pp: int = Field(default=1, ge=1, description="number of pipeline stages, processes")
    dp: int | None = Field(
        default=None,
        ge=1,
        description="data-parallel size, processes",
        json_schema_extra={"default": "world size / (tp * pp * cp)"},
    )
    cp: int = Field(default=1, ge=1, description="context-parallel size, processes; this version has 1 only")
    sequence_parallel: bool = Field(
        default=False,
        description="whether norms and residuals between tensor-parallel blocks are split over tp along the sequence; "
        "no effect at tp = 1",
    )
    schedule: Annotated[str, NameOrPath(tuple(SCHEDULE_RULES), ".csv")] = Field(
        default="1f1b",
        description="pipeline schedule, or a file with one of your own: "
        + "; ".join(f"{name}: {rule.about}" for name, rule in SCHEDULE_RULES.items()),
    )
    weight_stashing: bool = Field(
        default=False,
        description="PipeDream's asynchronous updates (arXiv:1806.03377): each stage changes its weights right after "
        "the backward of a microbatch, and keeps older ones for the backwards that need them; this changes the "
        "mathematics, and the result depends on the number of stages",
    )
    virtual_stages: int = derived(
        f"{_USUAL}, else the fewest that the schedule takes",
        lambda data: schedule_rule(data["schedule"]).default_virtual_stages,
        ge=1,
        description="chunks of layers that each pipeline stage holds (Megatron-LM's virtual pipeline size, model "
        "chunks); the model is cut into pp * virtual_stages chunks",
    )
    partition: Annotated[str, NameOrPath(("even", "cost"), ".json")] = Field(
        default="even",
        description="how layers are split over the chunks (DeepSpeed's partition_method) where stage_layers does not "
        "say it; even: by number; cost: by the computed floating-point operations of layers and head; a file: by "
        'measured seconds, {"layer": S, "embedding": S, "head": S}, layer may be a list with one entry a layer',
    )
    stage_layers: LayerCounts | None = Field(
        default=None,
        description="number of layers of each chunk, first to last, pp * virtual_stages entries; without virtual "
        "stages a chunk is a stage",
        json_schema_extra={"default": "as partition says"},
    )
    recompute: Annotated[tuple[Recompute, ...], OneOrMany] = Field(
        default=("none",),
        description="activations that are computed again in backward and not kept (activation checkpointing): none; "
        "selective, the core of attention (arXiv:2205.05198); full, whole layers; one for all pipeline stages, or a "
        "list with one for each",
        json_schema_extra={"default": "none"},
    )
    recompute_layers: int = Field(
        default=1,
        ge=1,
        description="full recompute: layers between two saved activations (Megatron-LM's recompute-num-layers)",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="what the dp ranks hold a slice of, and not the whole (ZeRO, arXiv:1910.02054): 0: nothing; 1: the "
        "optimizer's state; 2: the gradients too; 3: the parameters too",
    )
    zero_group: int | None = Field(
        default=None,
        ge=1,
        description="neighbouring dp ranks that share the slices (MiCS, arXiv:2205.00119; HSDP); groups hold the same, "
        "so that parameters are gathered within a group, as a rule a node; must divide dp",
        json_schema_extra={"default": "dp"},
    )
    gather_policy: Literal["auto", "regather", "keep"] = Field(
        default="auto",
        description="ZeRO 3: regather: a layer's parameters are whole from just before they are used until they were, "
        "in each forward and each backward; keep: from their first use in a step to their last; auto: keep where the "
        "predicted memory has room for it",
    )
    reduce_policy: Literal["step", "microbatch"] = Field(
        default="step",
        description="when gradients are summed over dp: step: once, after the last microbatch, until when a rank holds "
        "its own sum whole; microbatch: after each, so that from zero_stage 2 on a rank holds slices alone, for a "
        "reduction in each; the two add in another order, as another zero_group does",
    )

    @property
    def num_chunks(self) -> int:
        """Runs of layers into which the model is cut."""
        return self.pp * self.virtual_stages

    def recompute_of(self, stage: int) -> Recompute:
        """What a pipeline stage (process) recomputes."""
        return self.recompute[stage if len(self.recompute) > 1 else 0]
