"""What a run's training has cost so far: sums, counts and peaks, which survive restarts inside its
checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field

from pipeline.measure.constants import BETWEEN, PARTS, REST, Part
from pipeline.measure.operations import Work


@dataclass
class Totals:
    """Seconds and bytes."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys((*PARTS, REST, *BETWEEN), 0.0)
    )
    """of each part of the batches, the first of each attempt left out, and of what was done between
    batches
    """
    timed_batches: int = 0
    """whose parts these are"""
    steady_batches: int = 0
    steady_samples: int = 0
    """in batches whose speed counts: not the first of an attempt (compilation), nor where bytes or
    operations were counted
    """
    steady_seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys((*PARTS, REST), 0.0)
    )
    """of each part of those batches"""
    peak_saved_bytes: int | None = None
    state_bytes: int | None = None
    """of states beside what backward keeps; both None until a batch whose bytes are counted has
    ended
    """
    peak_rss_bytes: int = 0
    peak_pss_bytes: int = 0
    """the most that was seen, at the ends of what is measured: the kernel keeps no peak of it"""
    peak_device_bytes: int = 0
    peak_reserved_bytes: int = 0
    evaluation_peak_rss_bytes: int = 0
    """while the set was evaluated, without what training keeps free for itself: a batch at every
    time step, without a graph
    """
    evaluation_peak_device_bytes: int = 0
    evaluation_peak_reserved_bytes: int = 0
    device_j: float | None = None
    """what the device of one rank, in the mean, used in training; None without a counter"""
    backward_calls: int = 0
    batches: int = 0
    operations: dict[str, dict[str, int]] = field(default_factory=dict)
    """of this rank in the batches that were counted: for each purpose multiplications, additions,
    dense
    """
    operation_samples: int = 0
    not_counted: list[str] = field(default_factory=list)
    """operations of torch that make products, which no count of operations knows"""

    PEAKS = (
        "peak_saved_bytes",
        "state_bytes",
        "peak_rss_bytes",
        "peak_pss_bytes",
        "peak_device_bytes",
        "peak_reserved_bytes",
        "evaluation_peak_rss_bytes",
        "evaluation_peak_device_bytes",
        "evaluation_peak_reserved_bytes",
    )

    @property
    def train_s(self) -> float:
        """Of all batches but the first of each attempt."""
        return sum(self.seconds[name] for name in (*PARTS, REST))

    def of_a_steady_batch(self, part: Part) -> float | None:
        """Seconds in the mean; None where no batch was steady."""
        return self.steady_seconds[part] / self.steady_batches if self.steady_batches else None

    def share_of_steady_time(self, part: Part) -> float:
        """In 0..1; 0 where no batch was steady."""
        return self.steady_seconds[part] / self.steady_s if self.steady_s else 0.0

    @property
    def steady_s(self) -> float:
        return sum(self.steady_seconds.values())

    def add_operations(
        self, work: Mapping[str, Work], samples: int, not_counted: Collection[str] = ()
    ) -> None:
        for purpose, more in work.items():
            so_far = Work(**self.operations.get(purpose, {}))
            self.operations[purpose] = asdict(so_far + more)
        self.operation_samples += samples
        self.not_counted = sorted({*self.not_counted, *not_counted})

    def operations_per_sample(self) -> dict[str, dict[str, float]]:
        """For each purpose, of training on one sample."""
        return {
            purpose: {name: count / self.operation_samples for name, count in work.items()}
            for purpose, work in self.operations.items()
        }
