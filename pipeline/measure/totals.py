"""The costs of a run's training so far: sums, counts and peaks, which its checkpoints keep."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.measure.constants import BETWEEN, PARTS, REST, Part
from pipeline.measure.operations import Work


def _no_seconds(*names: str) -> Any:
    return field(default_factory=lambda: dict.fromkeys(names, 0.0))


@dataclass
class Totals:
    """Seconds, bytes and operations of one rank.

    A batch is timed unless it is the first of an attempt, which compiles and warms up. A timed
    batch is steady unless its bytes or operations were counted.
    """

    # of each part of the timed batches, and of the work between batches
    seconds: dict[str, float] = _no_seconds(*PARTS, REST, *BETWEEN)
    timed_batches: int = 0
    steady_batches: int = 0
    steady_samples: int = 0
    steady_seconds: dict[str, float] = _no_seconds(*PARTS, REST)
    # None until a batch has ended whose bytes are counted
    peak_saved_bytes: int | None = None
    state_bytes: int | None = None  # of states that backward does not save as well
    peak_rss_bytes: int = 0
    # The largest value that was read at the end of a measured section; the kernel keeps no peak.
    peak_pss_bytes: int = 0
    peak_device_bytes: int = 0
    peak_reserved_bytes: int = 0
    # during evaluations, without the memory that training keeps free for reuse
    evaluation_peak_rss_bytes: int = 0
    evaluation_peak_device_bytes: int = 0
    evaluation_peak_reserved_bytes: int = 0
    device_j: float | None = None  # energy of training, the mean over ranks; None without a counter
    backward_calls: int = 0
    batches: int = 0
    # by purpose: multiplications, additions and dense, of this rank in the counted batches
    operations: dict[str, dict[str, int]] = field(default_factory=dict)
    operation_samples: int = 0
    not_counted: list[str] = field(default_factory=list)  # operations with products, not counted

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
        """Seconds of all timed batches."""
        return sum(self.seconds[name] for name in (*PARTS, REST))

    def of_a_steady_batch(self, part: Part) -> float | None:
        """Mean seconds of a part; None without a steady batch."""
        return self.steady_seconds[part] / self.steady_batches if self.steady_batches else None

    def share_of_steady_time(self, part: Part) -> float:
        """A part's share of the steady time, in 0..1; 0 without a steady batch."""
        return self.steady_seconds[part] / self.steady_s if self.steady_s else 0.0

    @property
    def steady_s(self) -> float:
        """Seconds of all steady batches."""
        return sum(self.steady_seconds.values())

    def add_operations(
        self, work: Mapping[str, Work], samples: int, not_counted: Collection[str] = ()
    ) -> None:
        """Add the operations of one batch, by purpose."""
        for purpose, more in work.items():
            so_far = Work(**self.operations.get(purpose, {}))
            self.operations[purpose] = asdict(so_far + more)
        self.operation_samples += samples
        self.not_counted = sorted({*self.not_counted, *not_counted})

    def operations_per_sample(self) -> dict[str, dict[str, float]]:
        """Operations of training on one sample, by purpose."""
        return {
            purpose: {name: count / self.operation_samples for name, count in work.items()}
            for purpose, work in self.operations.items()
        }
