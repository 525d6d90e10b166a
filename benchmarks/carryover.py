"""What membranes carry over a time step: is it noise? The steps of a trained network as an
ensemble.

Command:  python -m benchmarks.carryover RUN [--steps 1,2,4,8] [--by object]
Result:   docs/LOG.md, 2026-11-26: another sample's carry-over costs 6 points of top-1 at T = 2

A LIF computes s[t] = 1 if x[t] + n[t] >= threshold else 0, with n[t] = decay v[t-1]. With n[t] held
constant, each step is a network of threshold units without memory, and the T steps are an ensemble
of networks with the same weights. SLTT differentiates this graph. The network is evaluated with
four carry-overs:

    real        the network as it is
    zero        n[t] = 0: every step equals the first
    shuffled    the n[t] of another sample
    gaussian    n[t] drawn with the mean and variance of its channel and step

If the carry-over were noise that is independent of the sample, the last two would do as well as the
first. Donors are drawn at random from the whole evaluation set, which must fit into memory twice.
The moments are those of the evaluation set. A network is causal in time, so one run gives every T.

Source: Meng et al. 2025 (SEI-BWSNN, arXiv 2508.12609), of which only the abstract is public; the
equations are a reconstruction. Standard errors over groups: Liang & Zeger 1986
(doi 10.1093/biomet/73.1.13) with the factor G / (G - 1).
"""

# T time, B batch, C channels, K classes, N samples and places within a channel

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import parse_time_steps
from pipeline.core.random import DONOR, bits, counter_hash, signed
from pipeline.core.torch_settings import computing
from pipeline.data.base import Data
from pipeline.measure.memory import device_here
from pipeline.models.attention import OverSamples
from pipeline.recipe import Recipe
from pipeline.spiking.encode import to_time_first
from pipeline.spiking.neuron import LIF, named_neurons
from pipeline.spiking.noise import noise
from pipeline.spiking.rate import WeightedRates
from pipeline.spiking.state import fresh_state
from pipeline.train.tasks import build_data
from pipeline.train.weights import load_run

Membranes = dict[str, list[Tensor]]
"""v[t-1] `[B, C, ...]` of each neuron by its module name, for t = 1..T"""
Batch = tuple[Tensor, Tensor, Tensor]
KEYS = ["T", "carry-over"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="the folder of a run of one task")
    parser.add_argument("--steps", default="1,2,4,8")
    parser.add_argument("--batch", type=int, default=32, help="samples at a time, 2 or more")
    parser.add_argument("--by", help="groups that standard errors are over, such as object")
    parser.add_argument("--which", choices=("last", "best"), default="last")
    parser.add_argument(
        "--trust", action="append", default=[], help="a package that the recipe names"
    )
    chosen = parser.parse_args()
    steps = parse_time_steps("carryover", chosen.steps)
    recipe = Recipe.read(chosen.run / "recipe.json", trust=chosen.trust)
    data = build_data(recipe)
    device = device_here()
    network = load_run(chosen.run, which=chosen.which, trust=tuple(chosen.trust)).to(device)
    batches = shuffled(data, size=chosen.batch, seed=recipe.seed)
    find_groups = getattr(data, "groups", None)
    if chosen.by and find_groups is None:
        parser.error(f"--by needs data that groups its samples; got {type(data).__name__}")
    groups = find_groups("val", by=chosen.by) if find_groups and chosen.by else None
    with computing(device, recipe.precision):
        samples = carried_over(network, batches, steps=steps, seed=recipe.seed, device=device)
    table = means(samples, groups)
    table.to_csv(chosen.run / "carryover.csv")
    print(table.to_string(float_format="{:.4f}".format))


def shuffled(data: Data, *, size: int, seed: int) -> list[Batch]:
    """The evaluation set in an order drawn from `seed`, as batches of x, target and index.

    The donor of a sample is the next one. The last sample of a batch is there as a donor alone: it
    begins the next batch, or began the first.
    """
    with (
        closing(data.val(rank=0, world=1, micro_batch=size, threads=1)) as loader,
        loader.epoch(0) as read,
    ):
        parts = [(batch.x.clone(), batch.target.clone(), batch.index.clone()) for batch in read]
    x_B, target_B, index_B = (torch.cat(column) for column in zip(*parts, strict=True))
    count = len(target_B)
    order = torch.from_numpy(np.argsort(bits(seed, 0, np.arange(count), DONOR), kind="stable"))
    batches = []
    for first in range(0, count, size - 1):
        rows = order[torch.arange(first, min(first + size - 1, count) + 1) % count]
        batches.append((x_B[rows], target_B[rows], index_B[rows]))
    return batches


@torch.no_grad()
def carried_over(
    network: nn.Module,
    batches: Sequence[Batch],
    *,
    steps: Sequence[int],
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """Evaluate a network with every carry-over.

    Returns:
        One row per sample, `T` and `carry-over`. `index`: the sample. `one`: the share of steps
        that are right. `ensemble`: whether the mean of the logits is right. `gap`: `ensemble` minus
        `one`. `disagree`: the share of pairs of steps that predict different classes. `loss of
        one`, `loss of ensemble`: their cross-entropy. `below real`: `ensemble` with the real
        carry-over minus this `ensemble`. `same class`: whether the donor has the sample's class.

    Raises:
        ValueError: the network carries over more than the membranes of its neurons.
    """
    network.eval()
    most = max(steps)
    moments = Moments()
    for x_B, _, _ in batches:
        moments.add(record(network, to_time_first(x_B.to(device), most))[1])
    tables = []
    for x_B, target_B, index_B in batches:
        x_TB, target = to_time_first(x_B.to(device), most), target_B[:-1].to(device)
        logits_TBK, real = record(network, x_TB)
        keys_of = lambda place, t, rows=index_B.tolist(): [
            counter_hash(seed, row, place, t) for row in rows
        ]
        logits = {"real": logits_TBK}
        for kind, membranes in {
            "zero": changed(real, lambda name, t, v_B: torch.zeros_like(v_B)),
            "shuffled": changed(real, lambda name, t, v_B: v_B.roll(-1, 0)),
            "gaussian": moments.drawn_like(real, keys_of),
        }.items():
            with replaying(network, membranes), fresh_state(network):
                logits[kind] = network(x_TB)
        for T in steps:
            scores = {
                kind: scores_of(each_TBK[:T, :-1].float(), target)
                for kind, each_TBK in logits.items()
            }
            for kind, table in scores.items():
                table.insert(0, "T", T)
                table.insert(1, "carry-over", kind)
                table["below real"] = scores["real"]["ensemble"] - table["ensemble"]
                table["same class"] = (target_B[:-1] == target_B[1:]).double().numpy()
                table["index"] = index_B[:-1].numpy()
                tables.append(table)
    return pd.concat(tables, ignore_index=True)


def scores_of(logits_TBK: Tensor, target_B: Tensor) -> pd.DataFrame:
    T, wide_TBK = len(logits_TBK), logits_TBK.double()
    predicted_TB = logits_TBK.argmax(-1)
    one_B = (predicted_TB == target_B).double().mean(0)
    ensemble_B = (logits_TBK.mean(0).argmax(-1) == target_B).double()
    differing_B = (predicted_TB[:, None] != predicted_TB[None]).double().sum((0, 1))
    losses_TB = torch.stack(
        [F.cross_entropy(each_BK, target_B, reduction="none") for each_BK in wide_TBK]
    )
    columns = {
        "one": one_B,
        "ensemble": ensemble_B,
        "gap": ensemble_B - one_B,
        "disagree": differing_B / max(1, T * (T - 1)),
        "loss of one": losses_TB.mean(0),
        "loss of ensemble": F.cross_entropy(wide_TBK.mean(0), target_B, reduction="none"),
    }
    return pd.DataFrame({name: value_B.cpu().numpy() for name, value_B in columns.items()})


def means(samples: pd.DataFrame, groups: Sequence[str] | None = None) -> pd.DataFrame:
    """The mean of each column for each T and carry-over, and its standard error over groups.

    `groups`: what each sample belongs to, by its index; None: every sample is drawn by itself.
    """
    values: Any = samples.drop(columns="index")
    values["group"] = samples["index"] if groups is None else np.asarray(groups)[samples["index"]]
    counted = values["group"].nunique()
    values = values.set_index([*KEYS, "group"])
    by_cell = values.groupby(KEYS, sort=False).mean()
    residuals = values - values.groupby(KEYS).transform("mean")
    squares = residuals.groupby([*KEYS, "group"]).sum() ** 2
    size = len(values) / len(by_cell)
    error = (squares.groupby(KEYS).sum() * (counted / (counted - 1))) ** 0.5 / size
    return by_cell.join(error[["ensemble", "gap", "below real"]].add_suffix(" ±"))


@torch.no_grad()
def record(model: nn.Module, x_TB: Tensor) -> tuple[Tensor, Membranes]:
    """Run a model on all T steps at once: its logits `[T, B, K]`, and what it carried over.

    Raises: ValueError for a model whose carry-over is not that of its membranes alone.
    """
    check(model)
    kept: Membranes = {}
    with ExitStack() as stack, fresh_state(model):
        for name, neuron in named_neurons(model):
            stack.callback(setattr, neuron, "carry", neuron.carry)
            neuron.carry = _keeping(neuron.carry, kept.setdefault(name, []))
        logits_TBK = model(x_TB)
    # The last step's membrane is carried nowhere; the first step begins at rest.
    return logits_TBK, {name: [torch.zeros_like(v[0]), *v[:-1]] for name, v in kept.items()}


def _keeping(carry: Callable[[Tensor], Tensor], kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def keep(v_B: Tensor) -> Tensor:
        kept.append(carry(v_B))
        return kept[-1]

    return keep


@contextmanager
def replaying(model: nn.Module, membranes: Membranes) -> Iterator[None]:
    """Inside, each neuron is a threshold unit without memory, with `membranes` as constants."""
    for name, neuron in named_neurons(model):
        neuron.custom_forward = _replay(membranes[name])
    try:
        yield
    finally:
        for _, neuron in named_neurons(model):
            neuron.custom_forward = None


def _replay(membranes: list[Tensor]) -> Callable[[LIF, Tensor], Tensor]:
    def run(lif: LIF, x_TB: Tensor) -> Tensor:
        # Step by step, as in the run, so that no bit differs.
        pairs = zip(x_TB, membranes, strict=True)
        return torch.stack(
            [lif.step(x_B.to(v_B.dtype), v_B)[0].to(x_TB.dtype) for x_B, v_B in pairs]
        )

    return run


def changed(membranes: Membranes, change: Callable[[str, int, Tensor], Tensor]) -> Membranes:
    return {
        name: [change(name, t, v_B) for t, v_B in enumerate(of)] for name, of in membranes.items()
    }


@dataclass
class Moments:
    """Mean and variance of a carry-over in each channel of each neuron at each step, in float64."""

    sums: dict[tuple[str, int], tuple[int, Tensor, Tensor]] = field(default_factory=dict)

    def add(self, membranes: Membranes) -> None:
        """Count all samples but the last, which is a donor alone."""
        for name, of in membranes.items():
            for t, v_B in enumerate(of):
                v_NC = v_B[:-1].double().movedim(1, -1).flatten(0, -2)
                count, sum_C, square_C = self.sums.get(
                    (name, t), (0, v_NC.new_zeros(()), v_NC.new_zeros(()))
                )
                self.sums[name, t] = (
                    count + len(v_NC),
                    sum_C + v_NC.sum(0),
                    square_C + v_NC.square().sum(0),
                )

    def of(self, name: str, t: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `[C]`."""
        count, sum_C, square_C = self.sums[name, t]
        mean_C = sum_C / count
        return mean_C, (square_C / count - mean_C.square()).clamp_min(0).sqrt()

    def drawn_like(
        self, membranes: Membranes, keys_of: Callable[[int, int], Sequence[int]]
    ) -> Membranes:
        """Gaussian membranes; `keys_of(neuron, t)` is a key of 64 bits for each sample."""
        places = {name: place for place, name in enumerate(membranes)}

        def draw(name: str, t: int, v_B: Tensor) -> Tensor:
            mean_C, deviation_C = (
                each_C.view(-1, *[1] * (v_B.dim() - 2)) for each_C in self.of(name, t)
            )
            keys_B = torch.tensor([signed(key) for key in keys_of(places[name], t)])
            z_BN = noise(keys_B.to(v_B.device), v_B[0].numel(), distribution="gaussian")
            z_B = z_BN.view_as(v_B)
            return (mean_C + deviation_C * z_B).to(v_B.dtype)

        return changed(membranes, draw)


def check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        carries = hasattr(module, "carry") and not isinstance(module, LIF)
        if carries or isinstance(module, OverSamples | WeightedRates):
            raise ValueError(
                "carryover: membranes of LIF neurons must be all that crosses a time step; "
                f"got {type(module).__name__} at {name or 'the model itself'}"
            )
        if isinstance(module, LIF) and module.custom_forward is not None:
            raise ValueError(f"carryover: release the rule that replaces the neuron at {name}")


if __name__ == "__main__":
    main()
