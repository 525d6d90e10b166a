"""What a training rule is: the piece of a training loop that decides what is differentiated, and
when.

    rule.attach(model)                                                   # once
    for objective in rule.loss_terms(model, x_TB, loss_of, step=step):   # once per batch that a
        worker holds (a micro-batch) if objective.backward is not None:
            objective.backward.backward()
    rule.end_of_batch()                                                  # once per global batch,
    before the weights move

A rule finds neurons and synapses and sets their seams; it never meets an optimizer, a label or a
process group."""

# T time, B batch, K classes

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_one_of
from pipeline.spiking.encode import is_static, repeat
from pipeline.spiking.neuron import identity
from pipeline.spiking.norm import BatchNorm, foreign_norms
from pipeline.spiking.rate import WeightedRates

OverTime = Literal["steps", "mean"]
LossOf = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class World:
    """What a rule may know of the run: its seed, and the other ranks, over which `mean` averages a
    statistic.
    """

    seed: int = 0
    rank: int = 0
    size: int = 1
    mean: Callable[[Tensor], Tensor] = identity


@dataclass(frozen=True)
class LossTerm:
    """One share of a batch.

    Over one call of `loss_terms` the `loss`es sum to the loss, the mean over samples and time, and
    the `logits` `[B, K]` to the mean over T, both detached. `backward` is the scalar to
    differentiate: over the call their gradients sum to the gradient of that loss, or to the rule's
    estimate of it. It is None where a rule reports a step and learns nothing from it."""

    backward: Tensor | None
    loss: Tensor
    logits: Tensor


class Rule(nn.Module):
    """Base of the rules; a Module only so that a rule's own state is moved and checkpointed.

    A rule says in `memory` how the bytes kept for its backward grow with T, in `update` when the
    loop may move the weights (after the batch, or after each objective), and in `over_time_choices`
    which losses it can differentiate.
    It overrides `_loss_terms`, and `attach` where it sets seams. A rule that learns by itself,
    beside the gradients, keeps what it learnt in buffers of fp32 (they are checkpointed) and moves
    it in `end_of_batch`, alike on every rank to the bit."""

    memory: Literal["constant", "linear"]
    update: Literal["batch", "step"] = "batch"
    over_time_choices: tuple[OverTime, ...] = ("steps",)
    calibration_batches: int = 0
    """global batches of the training set that `calibrate` wants to see before the first step"""
    adds_noise: bool = False
    """whether the activity in training is not the network's own, because the rule adds noise to
    it
    """
    backpropagates_errors: bool = True
    """whether the error of a layer comes through the synapse of the layer above it"""
    one_loss_per_step: bool = True
    """whether `loss_of` is called once per step, or once; False: also on what is no output of the
    network at a step
    """
    forecast_note: str = ""
    """how a forecast counts a batch whose work depends on values (`forecast/counts.py`); "": it
    does not
    """
    chunk: int | None = None
    """how many time steps the model is given at once; None: all of them"""
    tiny: Mapping[str, Any] = {}
    """the rule's own keywords in a recipe that `Recipe.tiny` shrinks"""

    world: World
    over_time: OverTime

    def __init__(self) -> None:
        super().__init__()
        self._last_step = -1
        # In a list: nn.Module would take the network for a part of the rule, with its parameters.
        self._attached: list[nn.Module] = []
        self._seams: list[tuple[nn.Module, str, Any]] = []

    @property
    def label(self) -> str:
        """The name in tables; distinct within a study."""
        return type(self).__name__

    def attach(
        self, model: nn.Module, *, world: World = World(), over_time: OverTime = "steps"
    ) -> None:
        """Tie the rule to `model`, once. The model's `state_dict` keeps its keys.

        Raises: ValueError when rule or model are taken, or when the rule cannot train this model or
        this loss."""
        refuse_unless_one_of(self.label, ("steps", "mean"), over_time=over_time)
        if over_time not in self.over_time_choices:
            why = (
                "the loss of the mean logits needs all T steps in one graph"
                if over_time == "mean"
                else "it has one loss, of rates"
            )
            raise ValueError(
                f"{self.label}: {why}, so over_time must be {self.over_time_choices[0]!r}; got"
                f" over_time={over_time!r}"
            )
        if self._attached:
            raise ValueError(f"{self.label}: release the first model before attaching another")
        for name, module in model.named_modules():
            carried = getattr(module, "carried_rule", None)
            if carried is not None:
                where = name or type(module).__name__
                raise ValueError(
                    f"{self.label}: the model must carry no rule yet; got {carried} on {where}"
                )
        if self.chunk is not None:
            refuse_whole_sequence_modules(self, model)
        weighted = next(
            (name for name, module in model.named_modules() if isinstance(module, WeightedRates)),
            None,
        )
        if weighted is not None and over_time == "steps":
            raise ValueError(
                f"{self.label}: logits that weigh the steps by their distance to the last, as"
                f" {weighted}, are a rate only as their mean, so over_time must be 'mean'; got"
                " over_time='steps'"
            )
        self.world = world
        self.over_time = over_time
        self._attached.append(model)
        for module in model.modules():
            self.set_seam(module, "carried_rule", self.label)

    def check_steps(self, steps: int) -> None:
        """Whether the rule can train on sequences of `steps` time steps, asked before anything is
        launched.

        Raises: ValueError that names the argument which does not fit.
        """
        if self.chunk is not None and self.chunk > steps:
            raise ValueError(
                f"{type(self).__name__}: chunk must be in 1..T; got chunk={self.chunk}, T={steps}"
            )

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Whether what the rule promises survives this optimizer; asked before anything is
        launched, and wherever one is built.

        Raises: ValueError that names what does not fit.
        """

    def check_tasks(self, model: nn.Module, tasks: int) -> None:
        """Whether the rule can learn so many tasks on the attached `model`, asked before anything
        is launched.

        Raises: ValueError that names the argument which does not fit.
        """

    def calibrate(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        """Set what depends on the data, such as thresholds, from `calibration_batches` of training
        inputs `x_TB`.

        Called once, at a fresh start, after `attach` and before anything is distributed; every rank
        sees the same batches."""

    def start_task(self, model: nn.Module, task: int) -> None:
        """Task `task` (from 0) of a recipe with several begins. Rules that know no tasks go on as
        before.
        """

    def end_of_batch(self) -> None:
        """All micro-batches of a global batch were differentiated; collective, where the rule
        averages over ranks.
        """

    def figures(self) -> dict[str, float]:
        """What the rule has to say of its last batch beside loss and accuracy, such as how well a
        solve converged.

        Reported in the journal as means over ranks, so the names are the same on every rank. NaN
        where no batch has given it yet, as in an attempt that trains none; the checkpoint has told
        it.
        """
        return {}

    def bytes(self) -> int:
        """Of what the rule has of its own, at its most in a batch: what it learns by itself, and
        notes until a batch ends.
        """
        return sum(buffer.nbytes for buffer in self.buffers()) + self.extra_bytes()

    def extra_bytes(self) -> int:
        """The part of `bytes` that is no buffer; what a network remembers (`spiking/state.py`) is
        the network's.
        """
        return 0

    def is_unsolved(self) -> bool:
        """Whether the rule found no gradient for the global batch at hand, which then is not a
        number: no batch to learn from.
        """
        return False

    def release(self) -> None:
        """Give the seams back what they held before `attach`; nothing happens where nothing is
        attached.
        """
        while self._seams:
            module, seam, before = self._seams.pop()
            setattr(module, seam, before)
        self._attached.clear()

    def set_seam(self, module: nn.Module, seam: str, value: Any) -> None:
        """Set `module.<seam>` until `release`."""
        self._seams.append((module, seam, getattr(module, seam, None)))
        setattr(module, seam, value)

    def loss_terms(
        self,
        model: nn.Module,
        x_TB: Tensor,
        loss_of: LossOf,
        *,
        step: int | None = None,
        rows: Sequence[int] | None = None,
    ) -> Iterator[LossTerm]:
        """The shares of one batch, in time order. Differentiate each before asking for the next.

        `model` is the attached model or a wrapper around it. `loss_of(logits_BK)` is a scalar, the
        mean over the batch; under `over_time="steps"` it is called once per step, in time order.
        `step` is the index of the global batch (None: one more than at the last call), `rows` the
        place of each sample in it (None: 0..B-1).

        Raises: ValueError, at once, when the model is not the attached one, the input has no time
        axis, or T does not fit."""
        if not self._attached:
            raise ValueError(f"{self.label}: attach(model) comes before loss_terms")
        if not any(module is self._attached[0] for module in model.modules()):
            raise ValueError(
                f"{self.label}: loss_terms needs the attached model or a wrapper around it; got"
                " another model"
            )
        if x_TB.dim() < 3 or x_TB.shape[0] < 1:
            raise ValueError(
                f"{self.label}: the input must be time first, [T, B, ...]; got shape"
                f" {tuple(x_TB.shape)}"
            )
        self.check_steps(x_TB.shape[0])
        step = self._last_step + 1 if step is None else step
        self._last_step = step
        return self._loss_terms(
            model, x_TB, loss_of, step, rows if rows is not None else range(x_TB.shape[1])
        )

    def loss_over_time(self, logits_TBK: Tensor, loss_of: LossOf) -> tuple[Tensor, Tensor]:
        """The loss of all T steps as `over_time` says, with its graph, and the mean logits `[B, K]`
        without.
        """
        if self.over_time == "steps":
            return slice_loss(logits_TBK, loss_of, steps=len(logits_TBK))
        return loss_of(logits_TBK.mean(0)), logits_TBK.detach().mean(0)

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        raise NotImplementedError(f"{type(self).__name__} must override _loss_terms")


def slice_loss(logits_TBK: Tensor, loss_of: LossOf, *, steps: int) -> tuple[Tensor, Tensor]:
    """A slice's share of the mean over `steps`: (sum of its steps' losses) / T with graph, (sum of
    its logits) / T without.
    """
    if (
        len(logits_TBK) == 1
    ):  # as a rule that goes step by step has it T times a batch: nothing to add up
        logits_BK = logits_TBK.squeeze(0)
        return loss_of(logits_BK) / steps, logits_BK.detach() / steps
    losses = [loss_of(logits_BK) for logits_BK in logits_TBK.unbind(0)]
    return torch.stack(losses).sum() / steps, logits_TBK.detach().sum(0) / steps


def slices(x_TB: Tensor, chunk: int | None) -> Iterator[Tensor]:
    """The input of an online rule, `chunk` steps at a time (None: all), each slice in storage of
    its own.

    The first synapse keeps its input for the backward. A slice that is a view would keep, and count
    as, all T steps; the slices of a still image share one frame and stay still.
    """
    size = chunk or len(x_TB)
    if is_static(x_TB):
        yield from repeat(_compact(x_TB[0]), len(x_TB)).split(size)
    else:
        for x_cB in x_TB.split(size):
            yield _compact(x_cB)


def _compact(x: Tensor) -> Tensor:
    """`x` in storage that holds nothing else."""
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


def detach_between_steps(rule: Rule, model: nn.Module) -> None:
    """Whatever `model` carries from one time step to the next becomes a constant: membranes, and
    feedback between steps.
    """
    for module in carrying_modules(model):
        rule.set_seam(module, "carry", torch.detach)


def carrying_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose `state` crosses a time step by way of their `carry`."""
    return [module for module in model.modules() if hasattr(module, "carry")]


def refuse_whole_sequence_modules(rule: Rule, model: nn.Module) -> None:
    """A rule that shows the model one slice of time after another cannot train what needs all T
    steps at once.

    Raises: ValueError that names the first norm with statistics over time, or weights that count
    back from the end."""
    refuse_foreign_norms(rule.label, model)
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm) and module.over == "time":
            need = "needs batch statistics per step, BatchNorm(over='step'); got over='time'"
        elif isinstance(module, WeightedRates):
            need = (
                "cannot weigh steps by their distance to the last, which WeightedRates does; got it"
            )
        else:
            continue
        raise ValueError(
            f"{rule.label}: a rule that runs in slices of time {need} at"
            f" {name or 'the model itself'}"
        )


def refuse_foreign_norms(who: str, model: nn.Module) -> None:
    """A norm that mixes time steps gives slices of time another forward than all T steps at once.

    Raises: ValueError, in the name of `who`, that names every such norm and what can replace it.
    """
    if norms := foreign_norms(model):
        got = ", ".join(f"{type(norm).__name__} at {name}" for name, norm in norms.items())
        raise ValueError(
            f"{who}: every norm must have statistics of one time step, or BPTT would train another"
            f" forward; got {got}; take pipeline.spiking.norm.BatchNorm, or standardise the weights"
            " (weights='standardized'); a norm that train() leaves in evaluation mode is accepted"
        )
