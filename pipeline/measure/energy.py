"""What an inference would cost in energy, from the operations that it really makes: an estimate,
beside what a card measured.

    E = mac MACs + ac ACs        MACs: products of two real numbers, each with its addition;  ACs:
    additions alone, for spikes

What is counted is what is made: a still image meets the first layer once, and its zeros cost
nothing. Most papers count that layer at each of T steps, zeros too: theirs is T times as large or
more, which must be said where ours stands beside it. And a mean of spikes, as a pool makes it, is a
real number, whose products are MACs; counts of synaptic operations take it for a spike, and their
price for such a layer is up to five times lower.

The prices are of arithmetic alone; moving weights and membranes costs more on most chips and is not
in them. What a card says that it used (`measure/energy.py`) is all that it used, on a chip of
another kind: it stands beside the estimate.

What a GPU has used, in joules, by its own counter (NVML): measured, beside the estimate of
measure/energy.py.

The counter is the whole card's, idle power and whoever else computes on it included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pynvml
import torch

from pipeline.core.units import shown
from pipeline.measure.operations import Work


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Of one operation, in pJ."""

    name: str
    mac_pj: float
    ac_pj: float
    source: str


_HOROWITZ = "Horowitz 2014, ISSCC (doi 10.1109/ISSCC.2014.6757323)"
FP32 = Prices(name="45 nm, fp32", mac_pj=4.6, ac_pj=0.9, source=_HOROWITZ)
FP16 = Prices(name="45 nm, fp16", mac_pj=1.5, ac_pj=0.4, source=_HOROWITZ)
INT8 = Prices(name="45 nm, int8", mac_pj=0.23, ac_pj=0.03, source=_HOROWITZ)
TABLES = (FP32, FP16, INT8)


@dataclass(frozen=True)
class Inference:
    """The forward of a trained network on some samples."""

    work: Work
    samples: int
    not_counted: tuple[str, ...] = ()
    """operations of torch that make products, which are in no count"""

    @property
    def macs(self) -> float:
        """Multiply-accumulates of a sample, all its time steps together."""
        return self.work.multiplications / self.samples

    @property
    def acs(self) -> float:
        """Accumulates without a multiplication, likewise."""
        return (self.work.additions - self.work.multiplications) / self.samples

    def told(self, measured_j: float | None = None, *, prices: Prices = FP32) -> dict[str, Any]:
        """For a summary: operations of a sample, and their energy in J, by these prices and by
        those of every table.

        `measured_j`: of a sample, by the cards' own counters; where none told, there is no such
        field.
        """
        by_table = {table.name: energy_j(self.macs, self.acs, table) for table in TABLES}
        energy = {
            "energy_j": energy_j(self.macs, self.acs, prices),
            "prices": prices.name,
            "energy_j_by_table": by_table,
        }
        measured = {} if measured_j is None else {"measured_j": measured_j}
        unknown = {"not_counted": list(self.not_counted)} if self.not_counted else {}
        return {
            "macs": self.macs,
            "acs": self.acs,
            **energy,
            **measured,
            "samples": self.samples,
            **unknown,
        }


def energy_j(macs: float, acs: float, prices: Prices = FP32) -> float:
    """E in joules."""
    return (prices.mac_pj * macs + prices.ac_pj * acs) * 1e-12


def in_words(inference: Mapping[str, Any], *, on_gpu: bool) -> str:
    """What `Inference.told` told: `an inference: 14.3 µJ estimated (45 nm, fp32), not measured on a
    CPU`
    """
    measured = inference.get("measured_j")
    if measured is not None:
        told = (
            f"{shown(measured, kind='J')} measured on the whole card, idle power and waits for data"
            " included"
        )
    else:
        told = "not measured: no card told it" if on_gpu else "not measured on a CPU"
    unknown = (
        f", without {', '.join(inference['not_counted'])}" if inference.get("not_counted") else ""
    )
    return (
        f"an inference: {shown(inference['energy_j'], kind='J')} estimated"
        f" ({inference['prices']}{unknown}), {told}"
    )


class Joules:
    """Counts on one device; `read` is None where nothing answers: a CPU, a card before Volta."""

    def __init__(self, device: torch.device) -> None:
        self.card = (
            f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""
        )
        """its UUID, whatever numbers a process has for its cards; empty for a CPU"""
        self._handle = _found(self.card) if self.card else None

    def read(self) -> float | None:
        """Joules since the driver was loaded."""
        if self._handle is None:
            return None
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3  # in mJ
        except pynvml.NVMLError:  # a driver that stumbles must not end a training
            return None


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What the counter of one rank's card stood at when its share of an evaluation began, and when
    it ended, in joules.
    """

    card: str
    samples: int
    began: float | None
    ended: float | None


def inference_j(ranks: Iterable[Readings]) -> float | None:
    """Of one sample, over all ranks that had some: what their cards used while they evaluated, over
    all of their samples.

    It is the whole card's energy over the evaluation's wall time: its idle power and its waits for
    data are in it, those for slower ranks are not. Launch gives each worker a card of its own; one
    that several ranks share counts once, from the first of them that began to the last that ended.

    None: a card did not tell, or its counter, which moves in steps, stood still, as it may in a
    very short evaluation."""
    spans: dict[str, tuple[float, float]] = {}
    samples = 0
    for rank in ranks:
        if not rank.samples:
            continue
        if rank.began is None or rank.ended is None:
            return None
        began, ended = spans.get(rank.card, (rank.began, rank.ended))
        spans[rank.card] = min(began, rank.began), max(ended, rank.ended)
        samples += rank.samples
    used = [ended - began for began, ended in spans.values()]
    return sum(used) / samples if used and min(used) > 0 else None


def _found(card: str) -> Any:
    """NVML's handle of the card, found by its UUID, as CUDA's numbers are of the visible ones
    alone; None without a counter.
    """
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(card)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return handle
