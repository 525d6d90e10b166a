"""Hebbian Learning based Orthogonal Projection: any rule, with gradients that protect old tasks.

Gradients are projected to be orthogonal to the inputs of old tasks.
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
from pipeline.rules.base import LossFn, LossTerm, OverTime, Rule, World
from pipeline.spiking.equilibrium import Equilibrium
from pipeline.spiking.error_feedback import FixedFeedback, sign_symmetric
from pipeline.spiking.local_learning import run_readouts
from pipeline.spiking.norm import BatchNorm, is_foreign_norm
from pipeline.spiking.norm_limit import LimitedSynapse
from pipeline.spiking.state import fresh_state, set_temporarily
from pipeline.spiking.subspace import (
    InputRecorder,
    SecondMoments,
    SpikingMoments,
    Subspace,
)
from pipeline.spiking.synapse import Conv2d, Linear, is_inside, request_seams
from pipeline.spiking.trace import shared_decay

LearnFrom = Literal["spikes", "traces", "rates"]
Error = Literal["backprop", "sign_symmetric", "feedback"]

# The declarations of `Rule` that HLOP copies from the inner rule.
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

# Purposes of random draws. The key of a draw contains its purpose.
_ROWS, _FEEDBACK = 0x484C4F50, 0x46414C47


class HLOP(Rule):
    """HLOP(inner): the gradients of `inner`, projected orthogonally to the inputs of old tasks.

        dL/dW <- dL/dW - (dL/dW H^T) H      from the second task on; H: the synapse's frozen rows

    H spans the inputs of the synapse in old tasks, so the outputs for these inputs do not change.
    Hebbian lateral neurons (`spiking/subspace.py`) learn H from the inputs of every batch, once per
    global batch. The inputs of a convolution are its patches, and its weight is a matrix
    `[out, C k k]`.

    `start_task` freezes the learnt rows and adds learning rows, which are orthogonal to the frozen
    rows. From the second task on, all parameter vectors (biases, thresholds, gains) are frozen by a
    gradient of 0, and batch norm uses its running statistics without updates. The outputs of old
    tasks do not change if H spans the old inputs of every time step. Otherwise they change by at
    most |dW| times the component of the inputs outside H. The projection requires SGD, with or
    without momentum. The momentum must start at 0 in each task, because an old momentum has a
    component inside the subspace. Weight decay, other optimizers such as Adam, and weights that are
    not the parameter itself (standardised, 1-bit, norm-limited) are refused.

    Args:
        rows: for each task, the numbers of new rows of the synapses in order of registration, such
            as `((80, 200, 100), (70, 70, 70))`. The last entry applies to all later tasks.
        learning_rate: the learning rate of the lateral neurons, one number or one per synapse, in
            units of 1 / x^2. Its product with the largest eigenvalue of E[x^T x] must be below
            about 4 (published: 0.01, and 0.001 for 784 normalised pixels).
        inner_iterations: the number of Hebbian updates per batch.
        momentum: the momentum of the Hebbian updates.
        learn_from: the inputs from which H is learnt. "spikes": the inputs of each time step. (In
            an equilibrium: the inputs of each simulated step, and those of f at a[T].) "traces":
            the traces of the inputs, under a rule with traces (OTTT, OPZO). "rates": the weighted
            means of the inputs over time, under a rule that passes all steps at once (DSR). "rates"
            protects the mean current of old tasks, but not the current of each step.
        lateral_steps: the number of time steps of spiking lateral neurons (published: 1000, 40);
            None: their responses are real numbers. The published spiking neurons differ in two
            ways. They fire again in each inner iteration; here they fire once per batch. They also
            compute the projection, so a part of the gradient remains in the old subspace (.0015 of
            it with 1000 steps, .037 with 40); here the projection is exact.
        error: the weights through which the error passes to the layer below. "backprop": the
            forward weights. "sign_symmetric" and "feedback": `spiking/error_feedback.py`. An inner
            rule without backpropagation (OPZO) must use "backprop".
        skip: names of modules that are neither projected nor frozen, such as the heads of tasks.

    The published code updates H at every forward from the samples of this forward (under OTTT at
    each step, from stacked spikes and traces). Here H learns from the mean over the global batch,
    so H does not depend on ranks and micro-batches. H is orthonormalised after each batch. The
    gradient of each backward call is projected separately.

    Raises: ValueError for arguments out of range (`__init__`); for a synapse or parameter that
    cannot be projected, a norm that mixes time steps, rows or learning rates that do not fit the
    synapses, or "traces" or "rates" that the inner rule or model does not have (`attach`); for an
    optimizer other than SGD without weight decay (`check_optimizer`); for slices of time under
    "rates" (`check_steps`); for fewer than two tasks, or too many rows of all tasks
    (`check_tasks`); for a task out of order (`start_task`); and for all that the inner rule
    refuses.
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
            "HLOP: rows must have, for each task, a whole number >= 0 for each synapse; got"
            f" rows={rows!r}",
        )
        rates = tuple(learning_rate) if isinstance(learning_rate, Sequence) else (learning_rate,)
        require(
            rates and all(admits(float, rate) and rate > 0 for rate in rates),
            f"HLOP: learning_rate must be numbers > 0; got learning_rate={learning_rate!r}",
        )
        lateral_counts = {} if lateral_steps is None else {"lateral_steps": lateral_steps}
        refuse_unless_counts("HLOP", {"inner_iterations": inner_iterations, **lateral_counts})
        require(
            0 <= momentum < 1,
            f"HLOP: momentum must be in 0..1, 1 excluded; got momentum={momentum}",
        )
        refuse_unless_one_of("HLOP", ("spikes", "traces", "rates"), learn_from=learn_from)
        refuse_unless_one_of("HLOP", ("backprop", "sign_symmetric", "feedback"), error=error)
        require(
            error == "backprop" or inner.backpropagates_errors,
            f"HLOP: error must be 'backprop' with {inner.label}, which does not backpropagate"
            f" errors between layers; got {error=}",
        )
        error_label = "" if error == "backprop" else f", {error.replace('_', '-')}"
        lateral_label = "" if lateral_steps is None else ", spiking"
        self.label = f"HLOP({inner.label}{error_label}{lateral_label})"
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
            f"{self.label}: learn_from must not be 'rates' for a model with an Equilibrium, whose"
            " synapses run one step at a time; got learn_from='rates'",
        )
        decay = shared_decay(self.label, model) if self.learn_from == "rates" else None
        # The inner rule does the checks of super().attach, which would refuse the attached model.
        self.inner.attach(model, world=world, over_time=over_time)
        if self.learn_from == "traces" and all(
            synapse.presynaptic is None for synapse in synapses.values()
        ):
            self.inner.release()
            raise ValueError(
                f"{self.label}: learn_from='traces' needs an inner rule with traces, such as OTTT;"
                f" got {self.inner.label}"
            )
        self._mark_attached(model, world, over_time)
        self._has_old_task = False  # whether `task` > 0
        self.task = torch.tensor([0])  # not `zeros`, because fake tensors would have no value
        self.subspaces = nn.ModuleList(
            Subspace(
                synapse.weight[0].numel(),
                dtype=torch.promote_types(synapse.weight.dtype, torch.float32),
                device=synapse.weight.device,
            )
            for synapse in synapses.values()
        )
        self._grow_subspaces()
        for (name, synapse), subspace in zip(synapses.items(), self.subspaces, strict=True):
            self._attach_synapse(name, synapse, subspace, decay)
        self._set_backward_weights(model)
        projected = {id(synapse.weight) for synapse in synapses.values()}
        for name, parameter in model.named_parameters():
            if (
                parameter.requires_grad
                and id(parameter) not in projected
                and not is_inside(name, self.skip)
            ):
                # From the second task on the gradient is 0. The optimizer keeps the parameter.
                self._hooks.append(
                    parameter.register_hook(
                        lambda g: torch.zeros_like(g) if self._has_old_task else None
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
        trace = synapse.presynaptic if self.learn_from == "traces" else None
        recorder = InputRecorder(name, synapse, subspace, moments, decay, trace)
        self._recorders.append(recorder)
        if trace is not None:
            self.set_seam(synapse, "presynaptic", recorder)
        else:
            # A closure, because a copy of the model would also copy the object of a bound method.
            self._hooks.append(
                synapse.register_forward_pre_hook(lambda _, inputs: recorder.record(inputs[0]))
            )
        if synapse.weight.requires_grad:
            self._hooks.append(
                synapse.weight.register_hook(
                    lambda g: subspace.project(g) if len(subspace.old) else None
                )
            )

    def _set_backward_weights(self, model: nn.Module) -> None:
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
        """Freeze the learnt rows and add the rows of `task`. `attach` adds those of task 0.

        The call is collective if the model has batch norm that is not frozen.
        """
        self.inner.start_task(model, task)
        if task == int(self.task) == 0:
            return
        require(
            task == int(self.task) + 1,
            f"{self.label}: tasks must start in order; got task {task} after task {int(self.task)}",
        )
        self.task += 1
        self._has_old_task = True
        self._grow_subspaces()
        for norm in self._unfrozen_norms():  # the mean, so that all ranks freeze the same values
            norm.running_mean.copy_(self.world.mean(norm.running_mean))
            norm.running_var.copy_(self.world.mean(norm.running_var))
            self.set_seam(norm, "frozen", True)

    def check_tasks(self, model: nn.Module, tasks: int) -> None:
        require(
            tasks >= 2,
            f"{self.label}: a recipe must have at least 2 phases, so that there is an earlier task;"
            f" got {tasks}",
        )
        self._check_rows(self._synapses_of(model), tasks=tasks)

    def _grow_subspaces(self) -> None:
        task = int(self.task)
        counts = self.rows[min(task, len(self.rows) - 1)]
        for index, (subspace, count) in enumerate(zip(self.subspaces, counts, strict=True)):
            require(
                count <= subspace.free_directions,
                f"{self.label}: the rows of task {task} must be at most the free directions of each"
                f" synapse; got {count} rows for {subspace.free_directions} free directions of"
                f" synapse {index}",
            )
            subspace.grow(count, key=counter_hash(self.world.seed, _ROWS, index, task))

    def _unfrozen_norms(self) -> list[BatchNorm]:
        """The batch norms outside `skip` that are not yet frozen."""
        return [
            module
            for name, module in self._attached[0].named_modules()
            if isinstance(module, BatchNorm)
            and not module.frozen
            and not is_inside(name, self.skip)
        ]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.begin_batch()  # the moments are of another batch than the checkpoint
        # start_task is not called again for the task of the checkpoint.
        self._has_old_task = int(self.task) > 0
        if self._has_old_task and self._attached:
            for norm in self._unfrozen_norms():
                self.set_seam(norm, "frozen", True)

    # -------------------------------------------------------------------------------------- batches

    def begin_batch(self) -> None:
        for recorder in self._recorders:
            recorder.pending = recorder.last = None

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_fn: LossFn, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        steps = x_TB.shape[0]
        if self.inner.adds_noise:
            # One more forward without noise, because H must protect the outputs without noise.
            with (
                torch.no_grad(),
                fresh_state(model),
                run_readouts(model),
                set_temporarily(self._recorders, "steps", steps),
            ):
                model(x_TB)
        terms = self.inner.loss_terms(model, x_TB, loss_fn, step=step, rows=rows)
        recorders = [] if self.inner.adds_noise else self._recorders
        while True:
            # Recording is off during the yield. Otherwise a recomputation in the backward would be
            # recorded too.
            with set_temporarily(recorders, "steps", steps):
                term = next(terms, None)
            if term is None:
                return
            yield term

    def end_of_batch(self) -> None:
        """Update the rows from the inputs of all micro-batches and ranks.

        It makes the collective calls of the inner rule, and one for each synapse that ran (three
        with spiking lateral neurons).
        """
        self.inner.end_of_batch()
        for recorder, rate in zip(self._recorders, cycle(self.learning_rates), strict=False):
            moments = recorder.finish_batch(self.world.mean)
            if moments is not None:
                recorder.subspace.learn(
                    moments, rate=rate, momentum=self.momentum, iterations=self.inner_iterations
                )

    def metrics(self) -> dict[str, float]:
        """The metrics of the inner rule, and two metrics per synapse.

        `energy_NAME` is the share of the inputs' energy that the rows preserve. `free_NAME` is the
        number of free directions.
        """
        metrics = dict(self.inner.metrics())
        for recorder in self._recorders:
            metrics[f"energy_{recorder.name}"] = recorder.energy()
            metrics[f"free_{recorder.name}"] = float(recorder.subspace.free_directions)
        return metrics

    def extra_bytes(self) -> int:
        return (
            sum(recorder.bytes() for recorder in self._recorders)
            + sum(each.matrix.nbytes for each in self._feedback)
            + self.inner.extra_bytes()
        )

    # ------------------------------------------------------- methods that also call the inner rule

    def is_unsolved(self) -> bool:
        return self.inner.is_unsolved()

    def steps_per_forward(self, steps: int) -> int:
        return self.inner.steps_per_forward(steps)

    def check_steps(self, steps: int) -> None:
        self.inner.check_steps(steps)
        passed = self.steps_per_forward(steps)
        require(
            self.learn_from != "rates" or passed == steps,
            f"{self.label}: learn_from='rates' needs an inner rule that passes all T steps to the"
            f" model at once; got {self.inner.label}, which passes {passed} of {steps}",
        )

    def calibrate(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self.inner.calibrate(model, batches)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner.check_optimizer(optimizer)
        require(
            isinstance(optimizer, torch.optim.SGD),
            f"{self.label}: the optimizer must be SGD, because its steps are sums of projected"
            f" gradients; got {type(optimizer).__name__}",
        )
        weight_decay = max(group["weight_decay"] for group in optimizer.param_groups)
        require(
            weight_decay == 0,
            f"{self.label}: weight_decay must be 0, because it would change weights in the"
            f" directions of old tasks; got weight_decay={weight_decay}",
        )

    # --------------------------------------------------------------------------------------- checks

    def _synapses_of(self, model: nn.Module) -> dict[str, Linear | Conv2d]:
        """Every Linear and Conv2d outside the modules in `skip`, by name, in order of registration.

        Raises: ValueError for an entry of `skip` that is not a module, a norm that mixes time
        steps, a limited synapse, a linear layer or convolution of torch, weights that are not plain
        or are parametrised, groups, a matrix that is not the weight of a synapse, a model without
        synapses, two synapses with one weight, or rows and learning rates that do not fit.
        """
        request_seams(model)
        modules = dict(model.named_modules())
        for name in self.skip:
            require(
                name in modules, f"{self.label}: skip must name modules of the model; got {name!r}"
            )
        synapses: dict[str, Linear | Conv2d] = {}
        for name, module in modules.items():
            if is_inside(name, self.skip):
                continue
            layer, is_synapse = type(module).__name__, isinstance(module, (Linear, Conv2d))
            weights = module.weights if is_synapse else "plain"
            groups = getattr(module, "groups", 1) if is_synapse else 1
            for is_refused, problem in (
                (
                    is_foreign_norm(module),
                    f"{layer}, which cannot be frozen (pipeline.spiking.norm.BatchNorm can),",
                ),
                (isinstance(module, LimitedSynapse), f"{layer}, which scales the weight,"),
                (isinstance(module, (nn.Linear, _ConvNd)) and not is_synapse, f"torch's {layer}"),
                (weights != "plain", f"{weights} weights"),
                (is_synapse and is_parametrized(module), "parametrised weights"),
                (groups != 1, f"groups={groups}"),
            ):
                require(
                    not is_refused,
                    f"{self.label}: every layer must be a Linear or Conv2d of"
                    " pipeline.spiking.synapse, with the parameter itself as its weight; got"
                    f" {problem} at {name or 'the model itself'}",
                )
            if isinstance(module, (Linear, Conv2d)):
                synapses[name] = module
        weight_ids = {id(synapse.weight) for synapse in synapses.values()}
        for name, parameter in model.named_parameters():
            require(
                parameter.dim() <= 1 or id(parameter) in weight_ids or is_inside(name, self.skip),
                f"{self.label}: every matrix must be the weight of a Linear or Conv2d; got {name}",
            )
        require(
            synapses and len(weight_ids) >= len(synapses),
            f"{self.label}: the model must have synapses, each with a weight of its own; got"
            f" {', '.join(synapses) or 'none'}",
        )
        self._check_rows(synapses, tasks=1)
        require(
            len(self.learning_rates) in (1, len(synapses)),
            f"{self.label}: learning_rate must be one number, or one for each of"
            f" {', '.join(synapses)}; got {self.learning_rates}",
        )
        return synapses

    def _check_rows(self, synapses: Mapping[str, Linear | Conv2d], *, tasks: int) -> None:
        """Check that `rows` has a number for each synapse, and not more rows than inputs.

        Raises: ValueError if not.
        """
        for counts in self.rows:
            require(
                len(counts) == len(synapses),
                f"{self.label}: rows must have a number for each of {', '.join(synapses)}; got"
                f" {counts}",
            )
        counts_of_tasks = (self.rows[min(task, len(self.rows) - 1)] for task in range(tasks))
        totals = map(sum, zip(*counts_of_tasks, strict=True))
        for (name, synapse), total in zip(synapses.items(), totals, strict=True):
            inputs = synapse.weight[0].numel()
            require(
                total <= inputs,
                f"{self.label}: the sum of rows over tasks 0..{tasks - 1} must be at most the"
                f" {inputs} inputs of {name}; got {total}",
            )
