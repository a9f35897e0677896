"""What each pipeline schedule asks of a layout; how they go is in `megatron_lite.pipeline.schedules`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleRule:
    """virtual_stages: fewest and most chunks of a rank (None: any number). usual_virtual_stages: of who does not say
    (None: the fewest). about: what it is, for people who choose one. All take any number of microbatches."""

    about: str
    virtual_stages: tuple[int, int | None] = (1, 1)
    usual_virtual_stages: int | None = None

    @property
    def default_virtual_stages(self) -> int:
        """Chunks of a rank of who does not say."""
        return self.usual_virtual_stages or self.virtual_stages[0]

    def takes(self, virtual_stages: int) -> bool:
        """Whether a rank can hold this many chunks."""
        fewest, most = self.virtual_stages
        return fewest <= virtual_stages and (most is None or virtual_stages <= most)


# Bubbles at equal costs of forward, input half and weight half, as a share of the computing of m microbatches; "holds":
# the activations of the whole of a rank's layers for so many microbatches. v: virtual stages.
SCHEDULE_RULES: dict[str, ScheduleRule] = {
    "gpipe": ScheduleRule("all forwards, then all backwards (arXiv:1811.06965); bubble (pp-1)/m; holds m"),
    "1f1b": ScheduleRule("one forward, one backward (arXiv:1806.03377); bubble (pp-1)/m; holds pp"),
    "eager-1f1b": ScheduleRule(
        "1f1b with a longer warm-up, which hides transfers (arXiv:2211.05322); bubble (pp-1)/m; holds 2pp-1"
    ),
    "interleaved": ScheduleRule(
        "1f1b over several chunks a rank (arXiv:2104.04473); bubble (pp-1)/(v m); holds pp+(pp-1)/v if pp divides m",
        virtual_stages=(1, None),
        usual_virtual_stages=2,
    ),
    "breadth-first": ScheduleRule(
        "gpipe over several chunks a rank (arXiv:2211.05953); bubble (pp-1)/(v m); holds m",
        virtual_stages=(1, None),
        usual_virtual_stages=2,
    ),
    "zb-h1": ScheduleRule(
        "1f1b with weight gradients put off (arXiv:2401.10241); bubble (pp-1)/(3 v m); holds pp if pp divides m",
        virtual_stages=(1, None),
    ),
    "zb-h2": ScheduleRule(
        "zb-h1 with a longer warm-up (arXiv:2401.10241); no bubble between first and last; holds 2pp-1"
    ),
    "zb-v": ScheduleRule(
        "down the ranks and up again (arXiv:2401.10241); no bubble between first and last; holds pp",
        virtual_stages=(2, 2),
    ),
    "dualpipe-v": ScheduleRule(
        "DualPipe cut in half (github.com/deepseek-ai/DualPipe); bubble (pp-1)/(6 m) from 2pp microbatches on; "
        "holds pp+1/2",
        virtual_stages=(2, 2),
    ),
}
