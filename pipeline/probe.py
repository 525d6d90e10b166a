"""What each rule would cost on a recipe's network, and what it would drop: on one batch, before any training.

Every rule gets the same network with the same weights, which rest, and the same batch of the recipe's data, through the loop
that trains. Recipes with a teacher are probed with its labels alone, and those of several tasks in their first.
"""

# T time, B batch

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pipeline.backend.plain import Plain
from pipeline.data.base import Batch
from pipeline.loop import MicroBatch, train
from pipeline.measure.fidelity import Fidelity, Gradients, fidelity, gradients
from pipeline.measure.memory import hardware
from pipeline.measure.meters import Meters
from pipeline.objective import Loss
from pipeline.recipe import Recipe, Spec, spec
from pipeline.rules.base import Rule, World
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.ide import IDE
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.rules.spide import SPIDE
from pipeline.spiking.encode import over_steps
from pipeline.tasks import tasks_of
from pipeline.worker import build_network, check_recipe, seed_everything

RULES = (
    spec(BPTT),
    spec(BPTT, recompute=True),
    spec(SLTT),
    spec(SLTT, k=1),
    spec(OTTT),
    spec(OPZO),
    spec(DSR),
    spec(IDE),
    spec(SPIDE),
)
UNTIMED = 3  # the first batch warms up, on the second bytes are counted, on the third operations
TIMED = 5
LEARNS_BY_ITSELF = 16  # batches that a rule with matrices of its own sees before its gradient is taken
DRAWS = 8
SAFE = 0.9
BASELINE = "BPTT"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one rule on one batch."""

    rule: str
    peak_saved_bytes: int
    state_bytes: int
    forward_s: float
    backward_s: float
    """of a batch, the median over batches; collectives and the optimizer are not in either"""
    operations: Mapping[str, Mapping[str, float]]
    """for each purpose, of training on one sample"""

    @property
    def compute_s(self) -> float:
        return self.forward_s + self.backward_s

    @property
    def multiplications(self) -> float:
        return sum(work["multiplications"] for work in self.operations.values())

    @property
    def additions(self) -> float:
        return sum(work["additions"] for work in self.operations.values())


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was found on one batch of a recipe."""

    recipe: str
    samples: int
    time_steps: int
    costs: tuple[Cost, ...]
    """BPTT first, where it can train the network"""
    fidelity: Fidelity | None
    """None where BPTT cannot train the network: nothing to compare with"""
    refused: Mapping[str, str]
    """rules that cannot train the network, and why"""
    hardware: Mapping[str, object]

    def cost(self, rule: str) -> Cost | None:
        return next((cost for cost in self.costs if cost.rule == rule), None)


def probe(recipe: Recipe, *, batch_size: int | None = None, rules: Sequence[Spec] = RULES) -> Probe:
    """Probe `rules`, and the recipe's own, on a batch of `batch_size` samples (None: what one worker would hold at a time).

    Raises: ValueError for a recipe that does not fit together, or where no rule can train its network; what the data refuse.
    """
    recipe = replace(recipe, teacher=None, objective=_of_labels(recipe))
    check_recipe(recipe, 1)
    size = batch_size or recipe.split(1).micro_batch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, loss = _network(recipe, device), recipe.objective.build()
    batch = first_batch(recipe, size)
    x_TB, target_B = over_steps(batch.x.to(device), recipe.time_steps), batch.target.to(device)

    costs, found, refused = [], {}, {}
    for each in dict.fromkeys((*rules, recipe.rule)):
        rule = each.build()
        if any(rule.label == cost.rule for cost in costs):
            continue
        try:
            rule.check_steps(recipe.time_steps)
            costs.append(_cost(rule, network, recipe, loss, x_TB, target_B))
            found[rule.label] = _draws(each, network, recipe, loss, x_TB, target_B)
        except ValueError as error:
            refused[rule.label] = str(error)
    if not costs:
        raise ValueError("probe: no rule can train this network; " + "; ".join(refused.values()))
    return Probe(
        recipe=recipe.name,
        samples=size,
        time_steps=recipe.time_steps,
        costs=tuple(costs),
        fidelity=_compared(found),
        refused=refused,
        hardware=hardware(),
    )


def first_batch(recipe: Recipe, size: int) -> Batch:
    """The first `size` samples that a run of the recipe would train on."""
    data = tasks_of(recipe)[0].data
    loader = data.train(seed=recipe.seed, rank=0, world=1, batch_size=size, micro_batch=size, threads=1)
    with closing(loader), loader.epoch(0) as batches:
        return next(iter(batches))


def _of_labels(recipe: Recipe) -> Spec:
    return recipe.objective if recipe.teacher is None else spec(_labels, of=recipe.objective)


def _labels(of: Loss) -> Loss:
    return of.labels


def _network(recipe: Recipe, device: torch.device) -> nn.Module:
    seed_everything(recipe.seed)
    return build_network(recipe, tasks_of(recipe)).to(device)


def _cost(rule: Rule, network: nn.Module, recipe: Recipe, loss: Loss, x_TB: Tensor, target_B: Tensor) -> Cost:
    network, samples = copy.deepcopy(network), x_TB.shape[1]
    rule.attach(network, world=World(recipe.seed), over_time=recipe.over_time)
    if rule.calibration_batches:
        rule.calibrate(network, [x_TB])
    meters = Meters(network, batch_size=samples, device=x_TB.device, memory_every=10**9, operations_every=10**9)
    backend = Plain(network, _resting, precision=recipe.precision)
    micro_batches = [MicroBatch(x_TB, target_B, range(samples), 1.0)]
    batches = ((step, micro_batches) for step in range(UNTIMED + TIMED))
    train(rule, backend, lambda step: None, batches, loss, meters)
    timed, totals = meters.clock.take()[UNTIMED:], meters.totals
    return Cost(
        rule=rule.label,
        peak_saved_bytes=totals.peak_saved_bytes,
        state_bytes=totals.state_bytes,
        forward_s=statistics.median(seconds["forward"] for seconds in timed),
        backward_s=statistics.median(seconds["backward"] for seconds in timed),
        operations=totals.operations_per_sample(),
    )


def _resting(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.0)


def _draws(rule: Spec, network: nn.Module, recipe: Recipe, loss: Loss, x_TB: Tensor, target_B: Tensor) -> list[dict[str, Tensor]]:
    """The gradients of a rule; of one that draws time steps, in several draws."""
    draws = DRAWS if isinstance(each := rule.build(), SLTT) and each.k is not None else 1
    batches = LEARNS_BY_ITSELF if isinstance(each, OPZO) else 1
    about = {"over_time": recipe.over_time, "seed": recipe.seed, "batches": batches}
    return [gradients(network, rule.build(), x_TB, loss(target_B), step=step, **about) for step in range(draws)]


def _compared(found: Mapping[str, Sequence[Gradients]]) -> Fidelity | None:
    if BASELINE not in found:
        return None
    (bptt,), sltt = found[BASELINE], found.get("SLTT")
    others = {label: draws for label, draws in found.items() if label != BASELINE}
    return fidelity(bptt, None if sltt is None else sltt[0], others)


# ---------------------------------------------------------------------------------------------------------------- advice


def advice(found: Probe) -> str:
    """One sentence: the cheapest rule whose gradient is near BPTT's in every layer, and what it saves.

    Cheapest: the least product of saved bytes and seconds. Near: a cosine of `SAFE` or more in every layer.
    """
    bptt = found.cost(BASELINE)
    if bptt is None or found.fidelity is None:
        return f"{found.recipe}: BPTT cannot train this network, so there is nothing to compare gradients with."
    lowest = {cost.rule: found.fidelity.lowest(cost.rule) for cost in found.costs if cost.rule != BASELINE}
    safe = [cost for cost in found.costs if cost.rule in lowest and lowest[cost.rule][1] >= SAFE]
    if not safe:
        rule, (layer, cosine) = max(lowest.items(), key=lambda item: -2 if math.isnan(item[1][1]) else item[1][1])
        return (
            f"No rule's gradient is near BPTT's in every layer: the nearest is {rule}, with a cosine of {cosine:.2f} at {layer}. "
            "Whether it learns all the same, a run says."
        )
    best = min(safe, key=lambda cost: cost.peak_saved_bytes * cost.compute_s)
    layer, cosine = lowest[best.rule]
    return (
        f"{best.rule} is safe here before training: its gradient has a cosine of {cosine:.2f} or more with BPTT's in every layer "
        f"(least at {layer}); it keeps {best.peak_saved_bytes / bptt.peak_saved_bytes:.0%} of BPTT's bytes "
        f"and takes {best.compute_s / bptt.compute_s:.0%} of its time."
    )
