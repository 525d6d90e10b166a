"""The interface of a training rule. A rule decides what is differentiated, and when.

    rule.attach(model)                                              # once
    # once per micro-batch:
    for term in rule.loss_terms(model, x_TB, loss_of, step=step):
        if term.backward is not None:
            term.backward.backward()
    rule.end_of_batch()                                             # once per global batch,
                                                                    # before the optimizer step

A rule sets seams of neurons and synapses. It never sees an optimizer, a label or a process group.
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
LossOf = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class World:
    """The part of the run that a rule may know: seed, rank, number of ranks, and `mean`.

    `mean` averages a tensor over ranks.
    """

    seed: int = 0
    rank: int = 0
    size: int = 1
    mean: Callable[[Tensor], Tensor] = identity


@dataclass(frozen=True)
class LossTerm:
    """One part of a batch's loss.

    Over one call of `loss_terms`, the `loss` values sum to the mean loss over samples and time, and
    the `logits` `[B, K]` sum to the mean over T; both are detached. `backward` is the scalar to
    differentiate. Its gradients sum to the gradient of that loss, or to the rule's estimate of it.
    It is None for a step that is reported but not learnt from.
    """

    backward: Tensor | None
    loss: Tensor
    logits: Tensor


class Rule(nn.Module):
    """Base class of the rules. It is a Module so that a rule's state is moved and checkpointed.

    A subclass overrides `_loss_terms`, and `attach` if it sets seams. State that a rule learns
    without gradients is in fp32 buffers, which are checkpointed. It is updated in `end_of_batch`,
    bit for bit equally on every rank. `label` is the rule's name in tables, unique within a study;
    by default the name of the class; a subclass may set it. A subclass declares:

        memory                  how the memory for its backward grows with T
        update                  when the loop may update the weights: after the batch, or after
                                each loss term
        over_time_choices       the losses that it can differentiate
        calibration_batches     the number of global training batches that `calibrate` needs before
                                the first step
        adds_noise              whether it adds noise to the forward; training activity is then not
                                the network's own
        backpropagates_errors   whether a layer's error passes through the synapse of the layer
                                above it
        one_loss_per_step       whether `loss_of` sees only the network's logits, once per step or
                                once; False: it also sees other logits
        forecast_note           how a forecast counts a batch whose work depends on values
                                (`forecast/step_counts.py`); "" if the work does not depend on them
        chunk                   the number of time steps per forward; None: all
        tiny                    keywords of the rule that `Recipe.tiny` sets in a small recipe
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
        # In a list, because nn.Module would register the network and its parameters.
        self._attached: list[nn.Module] = []
        self._seams: list[tuple[nn.Module, str, Any]] = []

    def attach(
        self, model: nn.Module, *, world: World = World(), over_time: OverTime = "steps"
    ) -> None:
        """Attach the rule to `model` and set its seams. The model's `state_dict` keeps its keys.

        Raises: ValueError if the rule or the model is attached already, or if the rule cannot train
        this model or this loss.
        """
        refuse_unless_one_of(self.label, ("steps", "mean"), over_time=over_time)
        why = (
            "the loss of the mean logits needs all T steps in one graph"
            if over_time == "mean"
            else "it has one loss, of rates"
        )
        require(
            over_time in self.over_time_choices,
            f"{self.label}: {why}, so over_time must be {self.over_time_choices[0]!r}; got"
            f" over_time={over_time!r}",
        )
        require(
            not self._attached, f"{self.label}: release the first model before attaching another"
        )
        for name, module in model.named_modules():
            carried = getattr(module, "carried_rule", None)
            require(
                carried is None,
                f"{self.label}: the model must carry no rule yet; got {carried} on"
                f" {name or type(module).__name__}",
            )
        if self.chunk is not None:
            refuse_whole_sequence_modules(self, model)
        weighted = next(
            (name for name, module in model.named_modules() if isinstance(module, WeightedRates)),
            None,
        )
        require(
            weighted is None or over_time != "steps",
            f"{self.label}: logits that weigh the steps by their distance to the last, as"
            f" {weighted}, are a rate only as their mean, so over_time must be 'mean'; got"
            " over_time='steps'",
        )
        self.world = world
        self.over_time = over_time
        self._attached.append(model)
        for module in model.modules():
            self.set_seam(module, "carried_rule", self.label)

    def check_steps(self, steps: int) -> None:
        """Check that the rule can train on sequences of `steps` time steps.

        Called before a run is launched.

        Raises: ValueError that names the argument.
        """
        require(
            self.chunk is None or self.chunk <= steps,
            f"{type(self).__name__}: chunk must be in 1..T; got chunk={self.chunk}, T={steps}",
        )

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that the rule's guarantees hold with this optimizer.

        Called before a run is launched, and whenever an optimizer is built.

        Raises: ValueError that names the setting.
        """

    def check_tasks(self, model: nn.Module, tasks: int) -> None:
        """Check that the rule can learn `tasks` tasks on the attached `model`.

        Called before a run is launched.

        Raises: ValueError that names the argument.
        """

    def calibrate(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        """Set data-dependent values, such as thresholds, before the first step.

        `batches` are `calibration_batches` training inputs `x_TB`.

        Called once at a fresh start, after `attach` and before anything is distributed. Every rank
        gets the same batches.
        """

    def start_task(self, model: nn.Module, task: int) -> None:
        """Called when task `task` (from 0) of a recipe with several tasks begins.

        Most rules ignore it.
        """

    def begin_batch(self) -> None:
        """Called before the first micro-batch of a global batch.

        A rule discards what an unfinished batch has left.
        """

    def end_of_batch(self) -> None:
        """Called after all micro-batches of a global batch are differentiated.

        It is collective in rules that average over ranks.
        """

    def metrics(self) -> dict[str, float]:
        """The rule's own metrics of its last batch, such as the residual of a solve.

        The journal reports their means over ranks, so the names must be the same on every rank. A
        value is NaN if no batch or checkpoint has set it yet.
        """
        return {}

    def bytes(self) -> int:
        """Peak bytes of the rule's own state within a batch.

        They include buffers, and statistics that are kept until the end of the batch.
        """
        return sum(buffer.nbytes for buffer in self.buffers()) + self.extra_bytes()

    def extra_bytes(self) -> int:
        """The part of `bytes` that is not in buffers.

        State of the network (`spiking/state.py`) is not included.
        """
        return 0

    def is_unsolved(self) -> bool:
        """Whether the rule failed to find a gradient for the current global batch.

        The gradient is then NaN.
        """
        return False

    def release(self) -> None:
        """Restore every seam to its value before `attach`.

        It has no effect if nothing is attached.
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
        """The loss terms of one batch, in time order.

        Differentiate each term before requesting the next.

        `model` is the attached model or a wrapper around it. `loss_of(logits_BK)` returns the mean
        loss over the batch; under `over_time="steps"` it is called once per step, in time order.
        `step` is the index of the global batch (None: the last one plus 1), `rows` the index of
        each sample in it (None: 0..B-1).

        Raises: ValueError, immediately, if the model is not the attached one, the input has no time
        axis, or T does not fit.
        """
        require(self._attached, f"{self.label}: attach(model) comes before loss_terms")
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
            model, x_TB, loss_of, step, rows if rows is not None else range(x_TB.shape[1])
        )

    def _one_loss_term(
        self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        """`_loss_terms` of a rule with one forward and one backward for all T steps."""
        with fresh_state(model):
            loss, mean_logits_BK = self.loss_over_time(model(x_TB), loss_of)
            yield LossTerm(backward=loss, loss=loss.detach(), logits=mean_logits_BK)

    def loss_over_time(self, logits_TBK: Tensor, loss_of: LossOf) -> tuple[Tensor, Tensor]:
        """The loss of all T steps as defined by `over_time`, and the mean logits `[B, K]`.

        The loss has a graph, the logits have none.
        """
        if self.over_time == "steps":
            return slice_loss(logits_TBK, loss_of, steps=len(logits_TBK))
        return loss_of(logits_TBK.mean(0)), logits_TBK.detach().mean(0)

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        raise NotImplementedError(f"{type(self).__name__} must override _loss_terms")


def slice_loss(logits_TBK: Tensor, loss_of: LossOf, *, steps: int) -> tuple[Tensor, Tensor]:
    """A slice's part of the mean over `steps`: its losses / `steps` and its logits / `steps`.

    The losses have a graph, the logits have none.
    """
    if len(logits_TBK) == 1:  # a shortcut for rules with single steps, which call this T times
        logits_BK = logits_TBK.squeeze(0)
        return loss_of(logits_BK) / steps, logits_BK.detach() / steps
    losses = [loss_of(logits_BK) for logits_BK in logits_TBK.unbind(0)]
    return torch.stack(losses).sum() / steps, logits_TBK.detach().sum(0) / steps


def slices(x_TB: Tensor, chunk: int | None) -> Iterator[Tensor]:
    """The input of an online rule, `chunk` steps at a time (None: all).

    Each slice has its own storage.

    The first synapse keeps its input for the backward. A view would keep all T steps, and count as
    all T steps. The slices of a static input share one frame and stay static.
    """
    size = chunk or len(x_TB)
    if is_static(x_TB):
        yield from repeat(_compact(x_TB[0]), len(x_TB)).split(size)
    else:
        yield from map(_compact, x_TB.split(size))


def _compact(x: Tensor) -> Tensor:
    """`x` in storage of its own."""
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


def detach_between_steps(rule: Rule, model: nn.Module) -> None:
    """Detach everything that `model` carries between time steps: membranes and feedback."""
    for module in carrying_modules(model):
        rule.set_seam(module, "carry", torch.detach)


def carrying_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose `state` crosses time steps through their `carry`."""
    return [module for module in model.modules() if hasattr(module, "carry")]


def refuse_whole_sequence_modules(rule: Rule, model: nn.Module) -> None:
    """Refuse modules that need all T steps in one call. For rules that pass slices to the model.

    Raises: ValueError that names the first norm with statistics over time, or the first
    `WeightedRates`.
    """
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
    """Refuse norms that mix time steps: slices would change the forward.

    Raises: ValueError, in the name of `who`, that names every such norm and its replacement.
    """
    norms = [f"{type(norm).__name__} at {name}" for name, norm in foreign_norms(model).items()]
    require(
        not norms,
        f"{who}: every norm must have statistics of one time step, or BPTT would train another"
        f" forward; got {', '.join(norms)}; take pipeline.spiking.norm.BatchNorm, or standardise"
        " the weights (weights='standardized'); a norm that train() leaves in evaluation mode is"
        " accepted",
    )
