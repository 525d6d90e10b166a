"""The quantities of a finished run: each is declared once, as one `Metric`.

`compare`, `report`, `dashboard`, claims, CSV and JSON take their columns, titles and units from
`METRICS`. To add a quantity, add one line to `METRICS` and write the value into `summary.json`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.measure.constants import MEMORY_EVERY


@dataclass(frozen=True)
class Metric:
    """A quantity of a finished run.

    Args:
        name: its column in the frame, in CSV and in JSON.
        title: the head of its column, and its name on an axis.
        unit: how it is printed: share, B, s, J, rate or count (`pipeline.core.units`).
        better: "less" or "more", whichever is better. Such a metric is compared with the baseline.
            A metric with "" is listed in another table, without a comparison.
        source: its dotted path in `summary.json`, or a function of the summary's numbers, which
            are keyed by dotted path. "": `name` is the path. A `*` in the name matches any key:
            each matching key of a summary gives a metric, and `{}` in the title becomes the key.
        description: an explanation of the quantity, for the captions of figures.
    """

    name: str
    title: str
    unit: str
    better: Literal["less", "more", ""] = ""
    source: str | Callable[[Mapping[str, float]], float | None] = ""
    description: str = ""

    def value(self, numbers: Mapping[str, float]) -> float | None:
        """The value in a summary; None if it was not measured or is not finite."""
        if callable(self.source):
            return self.source(numbers)
        return numbers.get(self.source or self.name)


def _sum(
    *paths: str, minus: Sequence[str] = (), minus_any: Sequence[str] = ()
) -> Callable[[Mapping[str, float]], float | None]:
    """The sum of `paths` less `minus` and `minus_any`. A missing number of `minus_any` is 0; any
    other missing number makes the result None.
    """

    def total(numbers: Mapping[str, float]) -> float | None:
        if not numbers.keys() >= {*paths, *minus}:
            return None
        return sum(numbers[path] for path in paths) - sum(
            numbers.get(path, 0.0) for path in (*minus, *minus_any)
        )

    return total


COMPUTE = "compute_s"
KEPT = "kept_bytes"
ENERGY = "inference.energy_j"
ENERGY_MEASURED = "inference.measured_j"

METRICS = [
    Metric("top1", "top-1", "share", "more"),
    Metric(
        "peak_saved_bytes",
        "saved bytes",
        "B",
        "less",
        description=(
            "the peak of the bytes that autograd saves for backward, without parameters. They are"
            " counted on the second batch of each start of a run and on every"
            f" {MEMORY_EVERY}th batch after it, or on the next batch if one of these is skipped"
        ),
    ),
    Metric(KEPT, "saved bytes and states", "B", "less", _sum("peak_saved_bytes", "state_bytes")),
    Metric("images_per_s", "images/s", "rate", "more"),
    Metric(
        "wall_s",
        "wall clock",
        "s",
        "less",
        _sum("wall_s", minus=["startup_s"], minus_any=["fidelity_s"]),
        description=(
            "the time of a run from the end of its first batch to its last event. It includes"
            " restarts, but neither their start-up nor comparisons with BPTT's gradient"
        ),
    ),
    Metric(
        COMPUTE,
        "compute time",
        "s",
        "less",
        _sum("steady_forward_s", "steady_backward_s"),
        description="the mean time of forward and backward over steady batches",
    ),
    Metric(
        ENERGY,
        "inference energy",
        "J",
        "less",
        description=(
            "an estimate for the arithmetic of one sample, from counted operations; it is never a"
            " measurement"
        ),
    ),
    Metric(ENERGY_MEASURED, "joules of an inference, measured", "J", "less"),
    Metric("state_bytes", "state bytes", "B"),
    Metric("peak_device_bytes", "peak on the device", "B"),
    Metric("peak_reserved_bytes", "peak reserved on the device", "B"),
    Metric("peak_rss_bytes", "peak RSS", "B"),
    Metric("peak_pss_bytes", "peak PSS between batches", "B"),
    Metric("evaluation_peak_device_bytes", "peak on the device while evaluating", "B"),
    Metric("evaluation_peak_reserved_bytes", "peak reserved on the device while evaluating", "B"),
    Metric("evaluation_peak_rss_bytes", "peak RSS while evaluating", "B"),
    Metric("startup_s", "start-up", "s"),
    Metric(
        "net_s", "wall clock without restarts", "s", "", _sum("net_s", minus_any=["fidelity_s"])
    ),
    Metric("device_j", "joules of training, measured", "J"),
    Metric("inference.energy_j_by_table.*", "joules of an inference, estimated ({})", "J"),
    Metric("operations.*.multiplications", "{}: multiplications", "count"),
    Metric("operations.*.additions", "{}: additions", "count"),
    Metric("held.parameters", "parameters", "B"),
    Metric("held.buffers", "buffers", "B"),
    Metric("held.gradients", "gradients", "B"),
    Metric("held.optimizer", "optimizer", "B"),
    Metric("held.teacher", "teacher", "B"),
    Metric("held.rule", "rule's tensors", "B"),
]


def metric(name: str) -> Metric:
    """The metric with this name. An unknown name becomes a metric that reads the summary."""
    return next((each for each in METRICS if each.name == name), Metric(name, name, "count"))


def compared_metrics() -> list[Metric]:
    return [each for each in METRICS if each.better]
