"""The interface of a training rule: how a loss is differentiated, and at which time steps.

    rule.attach(model)                                              # once
    # once per micro-batch:
    for term in rule.loss_terms(model, x_TB, loss_fn, step=step):
        if term.backward is not None:
            term.backward.backward()
    rule.end_of_batch()                                             # once per global batch,
                                                                    # before the optimizer step

A rule changes the model by setting seams: attributes of neurons, synapses and other modules
(`spiking/state.py`). A rule uses the process group only through `World.mean`, and does not see the
labels.
"""

# T time, B batch, K classes

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_one_of, require
from pipeline.spiking.encode import is_static, repeat
from pipeline.spiking.neuron import identity
from pipeline.spiking.norm import BatchNorm, foreign_norms
from pipeline.spiking.rate import WeightedRates
from pipeline.spiking.state import fresh_state

OverTime = Literal["steps", "mean"]
LossFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class World:
    """What a rule knows about the run: `seed`, its own `rank` of 0..`size` - 1, and `mean`.

    `mean` averages a tensor over ranks. It is collective.
    """

    seed: int = 0
    rank: int = 0
    size: int = 1
    mean: Callable[[Tensor], Tensor] = identity


@dataclass(frozen=True)
class LossTerm:
    """One part of a micro-batch's loss.

    All terms of one call of `loss_terms` belong together. The sum of their `loss` is the loss of
    the micro-batch, and the sum of their `logits` `[B, K]` is the mean of the logits over time.
    `loss` and `logits` are detached. `backward` is the scalar to differentiate, or None for a term
    without a gradient. The sum of the gradients of all terms is the gradient of the loss, or the
    rule's estimate of this gradient.
    """

    backward: Tensor | None
    loss: Tensor
    logits: Tensor


class Rule(nn.Module):
    """Base class of the rules. A rule is a Module, so checkpoints include its buffers.

    A subclass overrides `_loss_terms`, and `attach` if it sets seams. State that a rule learns
    without gradients must be in fp32 buffers on the model's device. It must be updated in
    `end_of_batch`, with bit-equal results on all ranks. `label` is the rule's name in tables; it
    must be unique within a study. The default is the name of the class. A subclass declares:

        memory                  how the memory for its backward grows with T
        update                  when the training loop may update the weights: after the batch, or
                                after each loss term
        over_time_choices       the losses that it can differentiate (`loss_over_time`)
        calibration_batches     the number of global training batches that `calibrate` needs before
                                the first step
        adds_noise              whether it adds noise to the forward in training
        backpropagates_errors   whether the error of a layer passes through the synapse of the layer
                                above it
        one_loss_per_step       whether `loss_fn` is called only with the network's logits; False:
                                it is also called with other logits
        forecast_note           the assumption of a forecast if the number of operations depends on
                                values (`forecast/step_counts.py`); "" if it does not
        chunk                   the number of time steps per forward; None: all
        tiny                    keyword arguments of the rule in a small recipe (`Recipe.tiny`)
    """

    memory: Literal["constant", "linear"]
    update: Literal["batch", "step"] = "batch"
    over_time_choices: tuple[OverTime, ...] = ("steps",)
    calibration_batches: int = 0
    adds_noise: bool = False
    backpropagates_errors: bool = True
    one_loss_per_step: bool = True
    forecast_note: str = ""
    chunk: int | None = None
    tiny: Mapping[str, Any] = {}

    world: World
    over_time: OverTime

    def __init__(self) -> None:
        super().__init__()
        self.label: str = getattr(type(self), "label", type(self).__name__)
        self._last_step = -1
        # In a list, because nn.Module would register an attribute that is a module.
        self._attached: list[nn.Module] = []
        self._seams: list[tuple[nn.Module, str, Any]] = []

    def attach(
        self, model: nn.Module, *, world: World = World(), over_time: OverTime = "steps"
    ) -> None:
        """Attach the rule to `model` and set the model's seams. `state_dict` keeps its keys.

        Raises: ValueError for an unknown `over_time`, if the rule or the model is already attached,
        or if the rule cannot train this model or this loss.
        """
        refuse_unless_one_of(self.label, ("steps", "mean"), over_time=over_time)
        reason = (
            "the loss of the mean logits needs all T steps in one graph"
            if over_time == "mean"
            else "the rule has only one loss, of rates"
        )
        require(
            over_time in self.over_time_choices,
            f"{self.label}: over_time must be {self.over_time_choices[0]!r}, because {reason}; got"
            f" over_time={over_time!r}",
        )
        require(
            not self._attached, f"{self.label}: release the first model before attaching another"
        )
        for name, module in model.named_modules():
            other_rule = getattr(module, "attached_rule", None)
            require(
                other_rule is None,
                f"{self.label}: the model must not be attached to another rule; got {other_rule} on"
                f" {name or type(module).__name__}",
            )
        if self.passes_slices:
            refuse_whole_sequence_modules(self, model)
        for name, module in model.named_modules():
            require(
                over_time == "mean" or not isinstance(module, WeightedRates),
                f"{self.label}: over_time must be 'mean' for a model with WeightedRates, because"
                " only the mean of its outputs is a rate; got over_time='steps' and WeightedRates"
                f" at {name or 'the model itself'}",
            )
        self._mark_attached(model, world, over_time)

    def _mark_attached(self, model: nn.Module, world: World, over_time: OverTime) -> None:
        self.world = world
        self.over_time = over_time
        self._attached.append(model)
        for module in model.modules():
            self.set_seam(module, "attached_rule", self.label)

    @property
    def passes_slices(self) -> bool:
        """Whether the model gets slices of the time steps, one after another."""
        return self.chunk is not None

    def steps_per_forward(self, steps: int) -> int:
        """The number of time steps that the model gets in one call, out of `steps`."""
        return min(self.chunk or steps, steps)

    def check_steps(self, steps: int) -> None:
        """Check that the rule can train on sequences of `steps` time steps.

        Called before a run is launched, and by `loss_terms`.

        Raises: ValueError that names the argument.
        """
        require(
            self.chunk is None or self.chunk <= steps,
            f"{type(self).__name__}: chunk must be in 1..T; got chunk={self.chunk}, T={steps}",
        )

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that the rule works with this optimizer.

        Called before a run is launched, and whenever an optimizer is created.

        Raises: ValueError that names the setting.
        """

    def check_tasks(self, model: nn.Module, tasks: int) -> None:
        """Check that the rule can learn `tasks` tasks on the attached `model`.

        Called before a run is launched.

        Raises: ValueError that names the argument.
        """

    def calibrate(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        """Set data-dependent values, such as thresholds, before the first training step.

        `batches` are `calibration_batches` training inputs `x_TB`, the same on every rank. Called
        once, after `attach` and before the model is distributed, but not in a resumed run.
        """

    def start_task(self, model: nn.Module, task: int) -> None:
        """Called at the start of task `task` (from 0). A recipe without phases has one task."""

    def begin_batch(self) -> None:
        """Called before the first micro-batch of a global batch.

        A rule discards its statistics of an unfinished batch.
        """

    def end_of_batch(self) -> None:
        """Called after the backward of all micro-batches of a global batch.

        It is collective in rules that average over ranks.
        """

    def metrics(self) -> dict[str, float]:
        """The rule's metrics of the last batch, such as the residual of a solver.

        The journal reports their means over ranks, so every rank must have the same names. A value
        is NaN before a batch or checkpoint sets it.
        """
        return {}

    def bytes(self) -> int:
        """Peak bytes of the rule's state within a batch: buffers and statistics of the batch."""
        return sum(buffer.nbytes for buffer in self.buffers()) + self.extra_bytes()

    def extra_bytes(self) -> int:
        """The part of `bytes` that is not in buffers, without the state of the network."""
        return 0

    def is_unsolved(self) -> bool:
        """Whether the gradient of the current global batch is NaN because a solver failed."""
        return False

    def release(self) -> None:
        """Restore every seam to its value before `attach`, if a model is attached."""
        while self._seams:
            module, seam, old_value = self._seams.pop()
            setattr(module, seam, old_value)
        self._attached.clear()

    def set_seam(self, module: nn.Module, seam: str, value: Any) -> None:
        """Set `module.<seam>` until `release`."""
        self._seams.append((module, seam, getattr(module, seam, None)))
        setattr(module, seam, value)

    def loss_terms(
        self,
        model: nn.Module,
        x_TB: Tensor,
        loss_fn: LossFn,
        *,
        step: int | None = None,
        rows: Sequence[int] | None = None,
    ) -> Iterator[LossTerm]:
        """The loss terms of one micro-batch, in time order.

        The caller must differentiate each term before it requests the next term.

        `model` is the attached model or a wrapper around it. `loss_fn(logits_BK)` returns the mean
        loss over the samples; under `over_time="steps"` it is called once per step, in time order
        (more often if `one_loss_per_step` is False).
        `step` is the index of the global batch (None: the last index plus 1). `rows` are the
        indices of the samples in the global batch (None: 0..B-1).

        Raises: ValueError, already at the call, if no model or another model is attached, the input
        has no time axis, or T does not fit.
        """
        require(self._attached, f"{self.label}: call attach(model) before loss_terms")
        require(
            any(module is self._attached[0] for module in model.modules()),
            f"{self.label}: loss_terms needs the attached model or a wrapper around it; got"
            " another model",
        )
        require(
            x_TB.dim() >= 3 and x_TB.shape[0] >= 1,
            f"{self.label}: the input must be time first, [T, B, ...]; got shape"
            f" {tuple(x_TB.shape)}",
        )
        self.check_steps(x_TB.shape[0])
        step = self._last_step + 1 if step is None else step
        if step != self._last_step:
            self.begin_batch()
        self._last_step = step
        return self._loss_terms(
            model, x_TB, loss_fn, step, rows if rows is not None else range(x_TB.shape[1])
        )

    def _one_loss_term(
        self, model: nn.Module, x_TB: Tensor, loss_fn: LossFn, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        """An implementation of `_loss_terms`: one forward and one backward for all T steps."""
        with fresh_state(model):
            loss, mean_logits_BK = self.loss_over_time(model(x_TB), loss_fn)
            yield LossTerm(backward=loss, loss=loss.detach(), logits=mean_logits_BK)

    def loss_over_time(self, logits_TBK: Tensor, loss_fn: LossFn) -> tuple[Tensor, Tensor]:
        """The loss of all T steps, and the mean logits `[B, K]` without a graph.

        With `over_time="steps"` the loss is the mean loss of the steps, with "mean" the loss of the
        mean logits.
        """
        if self.over_time == "steps":
            return slice_loss(logits_TBK, loss_fn, steps=len(logits_TBK))
        return loss_fn(logits_TBK.mean(0)), logits_TBK.detach().mean(0)

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_fn: LossFn, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        raise NotImplementedError(f"{type(self).__name__} must override _loss_terms")


def slice_loss(logits_TBK: Tensor, loss_fn: LossFn, *, steps: int) -> tuple[Tensor, Tensor]:
    """The sums of a slice's losses and of its logits, divided by `steps`, the number of all steps.

    The loss has a graph, the logits have none.
    """
    if len(logits_TBK) == 1:  # a faster path for rules that call this at each step
        logits_BK = logits_TBK.squeeze(0)
        return loss_fn(logits_BK) / steps, logits_BK.detach() / steps
    losses = [loss_fn(logits_BK) for logits_BK in logits_TBK.unbind(0)]
    return torch.stack(losses).sum() / steps, logits_TBK.detach().sum(0) / steps


def slices(x_TB: Tensor, chunk: int | None) -> Iterator[Tensor]:
    """The input in slices of `chunk` time steps (None: all), for rules with a backward per slice.

    The slices of a static input are static, and share one frame. Any other slice has its own
    storage: the first synapse keeps its input for the backward, and a view would keep all T steps
    in memory.
    """
    size = chunk or len(x_TB)
    if is_static(x_TB):
        yield from repeat(_compact(x_TB[0]), len(x_TB)).split(size)
    else:
        yield from map(_compact, x_TB.split(size))


def _compact(x: Tensor) -> Tensor:
    """`x`, copied if its storage also has other values."""
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


def detach_between_steps(rule: Rule, model: nn.Module) -> None:
    """Detach all values that pass from one time step to the next: membranes and feedback."""
    for module in modules_with_carry(model):
        rule.set_seam(module, "carry", torch.detach)


def modules_with_carry(model: nn.Module) -> list[nn.Module]:
    """The modules with a seam `carry`, which is applied to their state after each time step."""
    return [module for module in model.modules() if hasattr(module, "carry")]


def refuse_whole_sequence_modules(rule: Rule, model: nn.Module) -> None:
    """Refuse modules that need all T steps in one call, for a rule that passes slices of time.

    Raises: ValueError that names all norms of `refuse_foreign_norms`, or the first `BatchNorm` with
    statistics over time or `WeightedRates`.
    """
    refuse_foreign_norms(rule.label, model)
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm) and module.over == "time":
            problem = (
                "batch norm must be BatchNorm(over='step'), for a wrapped network norm='step' in"
                " wrap, or the rule must be BPTT without chunk; got over='time'"
            )
        elif isinstance(module, WeightedRates):
            problem = "the model must not have WeightedRates, whose weights depend on T; got one"
        else:
            continue
        raise ValueError(
            f"{rule.label}: under a rule that passes slices of time to the model, {problem} at"
            f" {name or 'the model itself'}"
        )


def refuse_foreign_norms(error_prefix: str, model: nn.Module) -> None:
    """Refuse norms that mix time steps, because slices of time would change their statistics.

    Raises: ValueError, which starts with `error_prefix` and names every such norm.
    """
    norms = [f"{type(norm).__name__} at {name}" for name, norm in foreign_norms(model).items()]
    require(
        not norms,
        f"{error_prefix}: the statistics of a norm must not mix time steps; got {', '.join(norms)};"
        " use pipeline.spiking.norm.BatchNorm, or standardise the weights"
        " (weights='standardized'); a norm that stays in evaluation mode after train() is also"
        " accepted",
    )
