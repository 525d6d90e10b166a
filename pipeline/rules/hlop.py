"""Hebbian Learning based Orthogonal Projection, which combines with any rule.

Gradients are projected away from the inputs of old tasks.
"""

# T time, B batch

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from pipeline.core.checks import are_counts, refuse_unless_counts, refuse_unless_one_of, require
from pipeline.core.random import counter_hash
from pipeline.recipe.spec import admits
from pipeline.rules.base import LossOf, LossTerm, OverTime, Rule, World
from pipeline.spiking.equilibrium import Equilibrium
from pipeline.spiking.error_feedback import FixedFeedback, sign_symmetric
from pipeline.spiking.local_learning import run_readouts
from pipeline.spiking.norm import BatchNorm, is_foreign_norm
from pipeline.spiking.norm_limit import LimitedSynapse
from pipeline.spiking.state import attribute_set, fresh_state
from pipeline.spiking.subspace import (
    InputRecorder,
    SecondMoments,
    SpikingMoments,
    Subspace,
)
from pipeline.spiking.synapse import Conv2d, Linear, is_inside
from pipeline.spiking.trace import shared_decay

LearnFrom = Literal["spikes", "traces", "rates"]
Error = Literal["backprop", "sign_symmetric", "feedback"]

# What a rule declares (`Rule`) that HLOP takes over from the rule inside it.
INHERITED = (
    "memory",
    "update",
    "over_time_choices",
    "calibration_batches",
    "adds_noise",
    "backpropagates_errors",
    "one_loss_per_step",
    "forecast_note",
    "chunk",
)

# Purposes of random draws, the first part of their keys.
_ROWS, _FEEDBACK = 0x484C4F50, 0x46414C47


class HLOP(Rule):
    """HLOP(inner): gradients of `inner`, projected orthogonally to the inputs of old tasks.

        dL/dW <- dL/dW - (dL/dW H^T) H      from the second task on; H the synapse's frozen rows

    H spans the inputs that the synapse had in old tasks, so its response to them does not change.
    Hebbian lateral neurons (`spiking/subspace.py`) learn H beside the weights, from the inputs of
    every batch, once per global batch. The inputs of a convolution are its patches, and its weight
    is a matrix `[out, C k k]`; the projection itself needs no patches.

    `start_task` freezes the learnt rows and starts new ones, orthogonal to them. From the second
    task on, all parameter vectors (biases, thresholds, gains) are frozen, with gradient 0, and
    batch norm uses its running statistics and keeps them. Old outputs stay exactly the same if H
    spans the old inputs of every step; otherwise they change by |dW| times the part of the inputs
    that H misses. This holds for SGD with or without momentum. The momentum must start at 0 in each
    task, because an old one still points into the subspace. Weight decay, Adam and similar
    optimizers, and weights that are not the plain parameter (standardised, 1-bit, norm-limited)
    violate it, so they are refused.

    Args:
        rows: number of rows that each synapse, in order of registration, gets in each task, such as
            `((80, 200, 100), (70, 70, 70))`; the last entry holds for all later tasks.
        learning_rate: of the lateral neurons, one number or one per synapse, in units of 1 / x^2.
            Times the largest eigenvalue of E[x^T x] it must stay below about 4 (published: 0.01,
            and 0.001 for 784 normalised pixels).
        inner_iterations: Hebbian updates per batch.
        momentum: of the Hebbian updates.
        learn_from: "spikes" are the inputs of each step (of an equilibrium: of each simulated step,
            and of its final state). "traces" are the factors that the inner rule multiplies with
            the error (OTTT, OPZO). "rates" are their weighted means over time (DSR), for rules that
            process all steps at once; they protect the mean current of old tasks, not that of each
            step.
        lateral_steps: the lateral neurons' responses are spikes of this many steps while they learn
            (published: 1000, 40); None: real numbers. The published neurons differ in two ways.
            They fire anew in each inner iteration, here once per batch. Their projection is rounded
            too, which leaves part of the gradient in the old subspace (.0015 and .037 of it on
            random inputs of 50 numbers); here the projection is exact.
        error: "backprop", or another weight that carries the error down: "sign_symmetric" or
            "feedback" (`spiking/error_feedback.py`). OPZO does not backpropagate errors and refuses
            them.
        skip: modules whose content is neither projected nor frozen, such as heads of single tasks.

    The published code learns at every forward from its own samples (under OTTT at each step, from
    stacked spikes and traces). Here H learns from the mean over the global batch, so that ranks and
    micro-batches agree, and it is orthonormalised after each batch. Each backward call is projected
    separately, so an online rule with `chunk` = T needs one projection per batch instead of T.

    Raises: ValueError for arguments out of range (when made); for a synapse or parameter that
    cannot be projected, torch's batch norm, rows that do not fit, traces or rates that the inner
    rule or model does not have (`attach`); for an optimizer other than plain SGD
    (`check_optimizer`); for slices under "rates" (`check_steps`); for fewer than two tasks, or rows
    of all tasks that do not fit (`check_tasks`); for a task out of order (`start_task`).
    Source: Xiao et al. 2024 (arXiv 2402.11984), sections 4.1-4.3.
    """

    def __init__(
        self,
        inner: Rule,
        *,
        rows: Sequence[Sequence[int]],
        learning_rate: float | Sequence[float] = 0.01,
        inner_iterations: int = 5,
        momentum: float = 0.9,
        learn_from: LearnFrom = "spikes",
        lateral_steps: int | None = None,
        error: Error = "backprop",
        skip: Sequence[str] = (),
    ) -> None:
        super().__init__()
        require(
            isinstance(inner, Rule) and not isinstance(inner, HLOP),
            f"HLOP: inner must be a rule other than HLOP; got {inner!r}",
        )
        require(
            isinstance(rows, Sequence) and rows and all(are_counts(row, minimum=0) for row in rows),
            "HLOP: rows must hold, for each task, a number >= 0 for each synapse; got"
            f" rows={rows!r}",
        )
        rates = tuple(learning_rate) if isinstance(learning_rate, Sequence) else (learning_rate,)
        require(
            rates and all(admits(float, rate) and rate > 0 for rate in rates),
            f"HLOP: learning_rate must be numbers > 0; got learning_rate={learning_rate!r}",
        )
        lateral = {} if lateral_steps is None else {"lateral_steps": lateral_steps}
        refuse_unless_counts("HLOP", {"inner_iterations": inner_iterations, **lateral})
        require(
            0 <= momentum < 1, f"HLOP: momentum must be in 0..1, below 1; got momentum={momentum}"
        )
        refuse_unless_one_of("HLOP", ("spikes", "traces", "rates"), learn_from=learn_from)
        refuse_unless_one_of("HLOP", ("backprop", "sign_symmetric", "feedback"), error=error)
        require(
            error == "backprop" or inner.backpropagates_errors,
            f"HLOP: {inner.label} hands no error from layer to layer, so error must be"
            f" 'backprop'; got {error=}",
        )
        path = "" if error == "backprop" else f", {error.replace('_', '-')}"
        spiking = "" if lateral_steps is None else ", spiking"
        self.label = f"HLOP({inner.label}{path}{spiking})"
        self.inner = inner
        for name in INHERITED:
            setattr(self, name, getattr(inner, name))
        self.rows = tuple(tuple(each) for each in rows)
        self.learning_rates = rates
        self.inner_iterations = inner_iterations
        self.momentum = momentum
        self.learn_from: LearnFrom = learn_from
        self.lateral_steps = lateral_steps
        self.error: Error = error
        self.skip = tuple(skip)
        self.register_buffer("task", torch.tensor([0]))
        self.subspaces: Any = nn.ModuleList()
        self._recorders: list[InputRecorder] = []
        self._feedback: list[FixedFeedback] = []
        self._hooks: list[RemovableHandle] = []

    # --------------------------------------------------------------------------- attach and release

    def attach(
        self, model: nn.Module, *, world: World = World(), over_time: OverTime = "steps"
    ) -> None:
        require(
            not self._attached, f"{self.label}: release the first model before attaching another"
        )
        synapses = self._synapses_of(model)
        require(
            self.learn_from != "rates"
            or not any(isinstance(module, Equilibrium) for module in model.modules()),
            f"{self.label}: an equilibrium is run one step at a time, so learn_from must not be"
            " 'rates'",
        )
        decay = shared_decay(self.label, model) if self.learn_from == "rates" else None
        # Not super().attach: the inner rule checks that no rule is attached to the model.
        self.inner.attach(model, world=world, over_time=over_time)
        if self.learn_from == "traces" and all(
            synapse.presynaptic is None for synapse in synapses.values()
        ):
            self.inner.release()
            raise ValueError(
                f"{self.label}: learn_from='traces' needs a rule that keeps traces, such as OTTT;"
                f" got {self.inner.label}"
            )
        self.world, self.over_time = world, over_time
        self._attached.append(model)
        for module in model.modules():
            self.set_seam(module, "carried_rule", self.label)
        self.task = torch.tensor([0])  # not `zeros`, which has no value under fake tensors
        self.subspaces = nn.ModuleList(
            Subspace(
                synapse.weight[0].numel(),
                dtype=torch.promote_types(synapse.weight.dtype, torch.float32),
                device=synapse.weight.device,
            )
            for synapse in synapses.values()
        )
        self._begin_rows()
        for (name, synapse), subspace in zip(synapses.items(), self.subspaces, strict=True):
            self._attach_synapse(name, synapse, subspace, decay)
        self._set_error_path(model)
        projected = {id(synapse.weight) for synapse in synapses.values()}
        for name, parameter in model.named_parameters():
            if (
                parameter.requires_grad
                and id(parameter) not in projected
                and not is_inside(name, self.skip)
            ):
                # From the second task on the gradient is 0; the parameter stays in the optimizer.
                self._hooks.append(
                    parameter.register_hook(
                        lambda g: torch.zeros_like(g) if int(self.task) else None
                    )
                )

    def release(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._recorders.clear()
        self._feedback.clear()
        super().release()
        self.inner.release()

    def _attach_synapse(
        self, name: str, synapse: Linear | Conv2d, subspace: Subspace, decay: float | None
    ) -> None:
        moments = (
            SecondMoments
            if self.lateral_steps is None
            else partial(SpikingMoments, steps=self.lateral_steps)
        )
        factor = synapse.presynaptic if self.learn_from == "traces" else None
        recorder = InputRecorder(name, synapse, subspace, moments, decay, factor)
        self._recorders.append(recorder)
        if factor is not None:
            self.set_seam(synapse, "presynaptic", recorder)
        else:
            # A closure: copying the model would copy the rule along with a bound method.
            self._hooks.append(
                synapse.register_forward_pre_hook(lambda _, inputs: recorder.record(inputs[0]))
            )
        if synapse.weight.requires_grad:
            self._hooks.append(
                synapse.weight.register_hook(
                    lambda g: subspace.project(g) if len(subspace.old) else None
                )
            )

    def _set_error_path(self, model: nn.Module) -> None:
        synapses = [module for module in model.modules() if isinstance(module, (Linear, Conv2d))]
        for index, synapse in enumerate(synapses):
            if self.error == "sign_symmetric":
                self.set_seam(synapse, "backward_weight", sign_symmetric)
            elif self.error == "feedback":
                key = counter_hash(self.world.seed, _FEEDBACK, index)
                self._feedback.append(FixedFeedback(synapse.weight.detach(), key=key))
                self.set_seam(synapse, "backward_weight", self._feedback[-1])

    # ---------------------------------------------------------------------------------------- tasks

    def start_task(self, model: nn.Module, task: int) -> None:
        """Freeze the learnt rows and start those of `task`; task 0 starts in `attach`.

        It is collective if the model has batch norm.
        """
        self.inner.start_task(model, task)
        if task == int(self.task) == 0:
            return
        require(
            task == int(self.task) + 1,
            f"{self.label}: tasks come one after another; got task {task} after task"
            f" {int(self.task)}",
        )
        self.task += 1
        self._begin_rows()
        for norm in self._moving_norms():  # frozen statistics are equal on every rank
            norm.running_mean.copy_(self.world.mean(norm.running_mean))
            norm.running_var.copy_(self.world.mean(norm.running_var))
            self.set_seam(norm, "frozen", True)

    def check_tasks(self, model: nn.Module, tasks: int) -> None:
        require(
            tasks >= 2,
            f"{self.label}: to protect earlier tasks, a recipe must have 2 phases or more;"
            f" got {tasks}",
        )
        self._check_rows(self._synapses_of(model), tasks=tasks)

    def _begin_rows(self) -> None:
        task = int(self.task)
        counts = self.rows[min(task, len(self.rows) - 1)]
        for index, (subspace, count) in enumerate(zip(self.subspaces, counts, strict=True)):
            require(
                count <= subspace.free,
                f"{self.label}: rows must fit into the inputs of a synapse; got {count} more for"
                f" task {task}, where synapse {index} has {subspace.free} directions left",
            )
            subspace.grow(count, key=counter_hash(self.world.seed, _ROWS, index, task))

    def _moving_norms(self) -> list[BatchNorm]:
        """The batch norms outside `skip` that are not frozen yet."""
        return [
            module
            for name, module in self._attached[0].named_modules()
            if isinstance(module, BatchNorm)
            and not module.frozen
            and not is_inside(name, self.skip)
        ]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **more: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **more)
        for recorder in self._recorders:  # after a rollback the last batch is void
            recorder.last = None
        # start_task is not called again for the task that was running.
        if int(self.task) and self._attached:
            for norm in self._moving_norms():
                self.set_seam(norm, "frozen", True)

    # -------------------------------------------------------------------------------------- batches

    def begin_batch(self) -> None:
        for recorder in self._recorders:
            recorder.pending = None

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        steps = x_TB.shape[0]
        if self.inner.adds_noise:
            # The responses to protect are those without noise, which need one more forward.
            with (
                torch.no_grad(),
                fresh_state(model),
                run_readouts(model),
                attribute_set(self._recorders, "steps", steps),
            ):
                model(x_TB)
        shares = self.inner.loss_terms(model, x_TB, loss_of, step=step, rows=rows)
        recorders = [] if self.inner.adds_noise else self._recorders
        while True:
            # Recording ends before the yield, so that a recomputation in the backward is not
            # recorded again.
            with attribute_set(recorders, "steps", steps):
                share = next(shares, None)
            if share is None:
                return
            yield share

    def end_of_batch(self) -> None:
        """Update the rows from the inputs of all micro-batches and ranks.

        It takes one or three collectives per synapse.
        """
        self.inner.end_of_batch()
        for recorder, rate in zip(self._recorders, cycle(self.learning_rates), strict=False):
            moments = recorder.finish(self.world.mean)
            if moments is not None:
                recorder.subspace.learn(
                    moments, rate=rate, momentum=self.momentum, iterations=self.inner_iterations
                )

    def metrics(self) -> dict[str, float]:
        """The inner rule's metrics, and two metrics per synapse.

        They are the share of energy that its rows keep, and its number of free directions.
        """
        metrics = dict(self.inner.metrics())
        for recorder in self._recorders:
            metrics[f"energy_{recorder.name}"] = recorder.energy()
            metrics[f"free_{recorder.name}"] = float(recorder.subspace.free)
        return metrics

    def extra_bytes(self) -> int:
        """Bytes of the recorded moments, of fixed feedback weights, and of the inner rule."""
        return (
            sum(recorder.bytes() for recorder in self._recorders)
            + sum(each.matrix.nbytes for each in self._feedback)
            + self.inner.extra_bytes()
        )

    # ----------------------------------------------------------- checks shared with the inner rule

    def is_unsolved(self) -> bool:
        return self.inner.is_unsolved()

    def check_steps(self, steps: int) -> None:
        self.inner.check_steps(steps)
        require(
            self.learn_from != "rates" or (self.chunk or steps) >= steps,
            f"{self.label}: learn_from='rates' needs a rule that gives all T steps to the model"
            f" at once; {self.inner.label} gives {self.chunk} of {steps}",
        )

    def calibrate(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self.inner.calibrate(model, batches)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner.check_optimizer(optimizer)
        require(
            isinstance(optimizer, torch.optim.SGD),
            f"{self.label}: the optimizer must be SGD, whose steps are sums of projected"
            f" gradients; got {type(optimizer).__name__}",
        )
        decay = max(group["weight_decay"] for group in optimizer.param_groups)
        require(
            decay == 0,
            f"{self.label}: weight_decay must be 0, because it also shrinks weights in the"
            f" directions of old tasks; got weight_decay={decay}",
        )

    # --------------------------------------------------------------------------------------- checks

    def _synapses_of(self, model: nn.Module) -> dict[str, Linear | Conv2d]:
        """Every Linear and Conv2d outside the modules in `skip`, by name, in order of registration.

        Raises: ValueError for a weight that is not a plain parameter (standardised, parametrised,
        norm-limited, of another class), a matrix outside the synapses, two synapses that share a
        weight, groups, a batch norm other than spiking.norm's, an entry of `skip` that is not a
        module, or rows and learning rates that do not fit.
        """
        modules = dict(model.named_modules())
        for name in self.skip:
            require(
                name in modules, f"{self.label}: skip must name modules of the model; got {name!r}"
            )
        synapses: dict[str, Linear | Conv2d] = {}
        for name, module in modules.items():
            if is_inside(name, self.skip):
                continue
            kind, is_synapse = type(module).__name__, isinstance(module, (Linear, Conv2d))
            weights = module.weights if is_synapse else "plain"
            groups = getattr(module, "groups", 1) if is_synapse else 1
            for is_refused, got in (
                (
                    is_foreign_norm(module),
                    f"{kind}, which cannot be frozen (pipeline.spiking.norm.BatchNorm can),",
                ),
                (isinstance(module, LimitedSynapse), f"{kind}, which scales the weight,"),
                (isinstance(module, (nn.Linear, _ConvNd)) and not is_synapse, f"torch's {kind}"),
                (weights != "plain", f"{weights} weights"),
                (is_synapse and is_parametrized(module), "parametrised weights"),
                (groups != 1, f"groups={groups}"),
            ):
                require(
                    not is_refused,
                    f"{self.label}: every layer must be a plain Linear or Conv2d, whose weight is"
                    f" the parameter itself; got {got} at {name or 'the model itself'}",
                )
            if isinstance(module, (Linear, Conv2d)):
                synapses[name] = module
        own_weights = {id(synapse.weight) for synapse in synapses.values()}
        for name, parameter in model.named_parameters():
            require(
                parameter.dim() <= 1 or id(parameter) in own_weights or is_inside(name, self.skip),
                f"{self.label}: every matrix must be the weight of a Linear or Conv2d; got {name}",
            )
        require(
            synapses and len(own_weights) >= len(synapses),
            f"{self.label}: the model must have synapses, each with a weight of its own; got"
            f" {', '.join(synapses) or 'none'}",
        )
        self._check_rows(synapses, tasks=1)
        require(
            len(self.learning_rates) in (1, len(synapses)),
            f"{self.label}: learning_rate must name one for each of {', '.join(synapses)}; got"
            f" {self.learning_rates}",
        )
        return synapses

    def _check_rows(self, synapses: Mapping[str, Linear | Conv2d], *, tasks: int) -> None:
        """Each synapse needs a number of rows, and enough inputs for the rows of `tasks` tasks."""
        for each in self.rows:
            require(
                len(each) == len(synapses),
                f"{self.label}: rows must name one for each of {', '.join(synapses)}; got {each}",
            )
        what = "rows" if tasks == 1 else f"rows of all {tasks} tasks"
        repeated = (self.rows[min(task, len(self.rows) - 1)] for task in range(tasks))
        totals = map(sum, zip(*repeated, strict=True))
        for (name, synapse), rows in zip(synapses.items(), totals, strict=True):
            inputs = synapse.weight[0].numel()
            require(
                rows <= inputs,
                f"{self.label}: {what} must fit into the {inputs} inputs of {name}; got {rows}",
            )
