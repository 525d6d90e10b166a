"""The energy of an inference: estimated from its operations, or measured by a GPU's counter.

The operations are counted on samples from the whole evaluation set (`RandomSample`).

    E = mac MACs + ac ACs        mac, ac: the energy of one operation (`PRICES`)
                                 MACs: multiply-accumulates of two real numbers
                                 ACs: additions without a multiplication, for spikes

Only executed operations count: a still image passes the first layer once, and zeros cost nothing.
Most papers count the first layer at each of the T steps, zeros included. Their figure can therefore
be T times larger, or even more; mention this in a comparison. A mean of spikes, for example from a
pooling layer, is a real number, and its products are MACs. Papers that count synaptic operations
treat the mean as a spike, so their estimate for such a layer is about five times lower in fp32.

The prices cover arithmetic only. Moving weights and membranes costs more on most chips and is not
included. A GPU's counter (NVML) measures the whole card, including its idle power and all other
work on it. A GPU is also another kind of chip, so the measurement does not replace the estimate.
"""

# T time, B batch

from bisect import insort
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import pynvml
import torch
from torch import Tensor

from pipeline.core.random import COUNTED, bits
from pipeline.core.units import format_quantity
from pipeline.measure.operations import Work
from pipeline.spiking.encode import is_static, repeat

# Energy of a multiply-accumulate and of an addition, in pJ: Horowitz 2014, ISSCC (doi
# 10.1109/ISSCC.2014.6757323).
PRICES = {
    "45 nm, fp32": (4.6, 0.9),
    "45 nm, fp16": (1.5, 0.4),
    "45 nm, int8": (0.23, 0.03),
}
FP32 = "45 nm, fp32"


@dataclass(frozen=True)
class Inference:
    """Work of a trained network's forward pass on some samples."""

    work: Work
    samples: int
    not_counted: tuple[str, ...] = ()  # torch operations whose products are not in `work`

    @property
    def macs(self) -> float:
        """Multiply-accumulates per sample, over all its time steps."""
        return self.work.multiplications / self.samples

    @property
    def acs(self) -> float:
        """Additions without a multiplication, per sample, over all its time steps."""
        return (self.work.additions - self.work.multiplications) / self.samples

    def to_dict(self, measured_j: float | None = None) -> dict[str, Any]:
        """Operations per sample, and their energy in J at the prices of fp32 and at all `PRICES`.

        `measured_j`: measured joules per sample. None omits the key.
        """
        return {
            "macs": self.macs,
            "acs": self.acs,
            "energy_j": energy_j(self.macs, self.acs),
            "prices": FP32,
            "energy_j_by_table": {
                prices: energy_j(self.macs, self.acs, prices) for prices in PRICES
            },
            **({} if measured_j is None else {"measured_j": measured_j}),
            "samples": self.samples,
            **({"not_counted": list(self.not_counted)} if self.not_counted else {}),
        }


class RandomSample:
    """Copies of up to `max_samples` inputs, drawn evenly from a stream of any length.

    Each position in the stream gets a random number, and the samples with the smallest numbers are
    kept. They represent the whole stream, whether it is sorted by class or its classes alternate.
    """

    def __init__(self, max_samples: int) -> None:
        self.max_samples = max_samples
        self._seen = 0  # samples of the stream
        self._steps = 0  # time steps of a still image, which is stored once; 0: store each step
        self._kept: list[tuple[int, Tensor]] = []  # in the order of the random numbers

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, x_TB: Tensor) -> None:
        """Draw from the samples of a batch, which holds only still images or only recordings."""
        self._steps = len(x_TB) if is_static(x_TB) else 0
        positions_B = np.arange(self._seen, self._seen + x_TB.shape[1])
        self._seen += len(positions_B)
        for row, number in enumerate(bits(0, 0, positions_B, COUNTED).tolist()):
            if len(self) < self.max_samples or number < self._kept[-1][0]:
                x = x_TB[0, row] if self._steps else x_TB[:, row]
                insort(self._kept, (number, x.clone()), key=itemgetter(0))
                del self._kept[self.max_samples :]

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the kept samples as `x_TB` of at most `size` samples. Still images stay still."""
        for first in range(0, len(self), size):
            batch = [x for _, x in self._kept[first : first + size]]
            yield repeat(torch.stack(batch), self._steps) if self._steps else torch.stack(batch, 1)


def energy_j(macs: float, acs: float, prices: str = FP32) -> float:
    """Estimated energy E in joules, at the named `PRICES`."""
    mac_pj, ac_pj = PRICES[prices]
    return (mac_pj * macs + ac_pj * acs) * 1e-12


def describe_inference(inference: Mapping[str, Any], *, on_gpu: bool) -> str:
    """Describe the dict of `Inference.to_dict` in one line.

    An example is `an inference: 14.3 µJ estimated (45 nm, fp32), not measured on a CPU`.
    """
    if (measured := inference.get("measured_j")) is not None:
        measurement = (
            f"{format_quantity(measured, kind='J')} measured on the whole card, idle power and"
            " waits for data included"
        )
    else:
        measurement = (
            "not measured: a card has no counter, or its counter did not move"
            if on_gpu
            else "not measured on a CPU"
        )
    not_counted = ", ".join(inference.get("not_counted", ()))
    prices = f"{inference['prices']}, without {not_counted}" if not_counted else inference["prices"]
    return (
        f"an inference: {format_quantity(inference['energy_j'], kind='J')} estimated ({prices}),"
        f" {measurement}"
    )


class EnergyCounter:
    """The energy counter of one device. CPUs, and cards older than Volta, have no counter."""

    def __init__(self, device: torch.device) -> None:
        # The card's UUID, which is the same in every process. It is empty for a CPU.
        self.card, self._handle = "", None
        if device.type == "cuda":
            self.card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            with suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                # By UUID, because CUDA numbers only the visible cards.
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(self.card)

    def read(self) -> float | None:
        """Joules since the driver was loaded; None without a counter or after an error."""
        if self._handle is not None:
            with suppress(pynvml.NVMLError):  # an error of the driver must not end a training
                return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3  # mJ to J
        return None


@dataclass(frozen=True, kw_only=True)
class EnergyReadings:
    """One rank's counter readings in joules, before and after its share of an evaluation."""

    card: str
    samples: int
    start_j: float | None
    end_j: float | None


def joules_per_sample(ranks: Iterable[EnergyReadings]) -> float | None:
    """Measured joules of an evaluation on all cards, divided by its samples.

    The figure includes each card's idle power and its waits for data, but not its wait for slower
    ranks. A card that several ranks share counts once, from the earliest start of these ranks to
    the latest end.

    None if no rank has samples, a card has no counter, or a counter did not move. A counter moves
    in steps, so a very short evaluation may not move it.
    """
    readings_j: dict[str, tuple[float, float]] = {}  # by card
    evaluated = [rank for rank in ranks if rank.samples]
    for rank in evaluated:
        if rank.start_j is None or rank.end_j is None:
            return None
        start_j, end_j = readings_j.get(rank.card, (rank.start_j, rank.end_j))
        readings_j[rank.card] = min(start_j, rank.start_j), max(end_j, rank.end_j)
    used_j = [end_j - start_j for start_j, end_j in readings_j.values()]
    samples = sum(rank.samples for rank in evaluated)
    return sum(used_j) / samples if used_j and min(used_j) > 0 else None
