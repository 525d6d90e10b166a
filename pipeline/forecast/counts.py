"""Counts of one training step at full size, on tensors with shapes but without values.

    bench = FakeBench(recipe, samples)
    counted(bench, spec(SLTT)).traffic.kernels

The counts are bytes saved for backward, states, floating-point operations, kernels, and the bytes
that kernels move. Nothing is computed and no data is read, so a step of any size takes only the
time of its Python code. torch's fake tensors report a CPU as their device, so the counts are those
of the code for a CPU. They equal those of a measured step, with two exceptions:

    IDE      a solve takes its maximum number of iterations; a measured one may converge earlier
    SPIDE    a linear feedback is a dense product, as on a GPU; a CPU skips silent neurons

Thresholds that a rule calibrates on data affect values only, and are left unchanged.
"""

# B batch

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipeline.core.stages import say_stage
from pipeline.core.torch_settings import Precision
from pipeline.core.units import counted as count_of
from pipeline.forecast.bench import (
    Bench,
    bytes_of_batch,
    step_inputs,
    teacher_bytes,
    untrained_teacher,
)
from pipeline.forecast.devices import Operation
from pipeline.measure.meters import Meters
from pipeline.measure.operations import Pausable
from pipeline.measure.saved_bytes import HeldBytes, held_bytes
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.rules.base import Rule
from pipeline.train.tasks import tasks_of


class Traffic(TorchDispatchMode, Pausable):
    """Records every operation that torch calls below autograd inside the `with` block.

    It counts the multiply-adds of a product, zeros included (a GPU multiplies them), and the bytes
    of inputs and outputs.
    """

    def __init__(self, operations: Iterable[Operation] = ()) -> None:
        super().__init__()
        self.operations = list(operations)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.is_paused and not _moves_nothing(func):
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count is not None else 0
            moved = _bytes(args) + _bytes(kwargs) + _bytes(result)
            self.operations.append(Operation(int(flops), moved))
        return result

    @property
    def flops(self) -> int:
        return sum(each.flops for each in self.operations)

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.operations)

    @property
    def kernels(self) -> int:
        return len(self.operations)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The counts of one rule on one batch, without the optimizer."""

    rule: str
    peak_saved_bytes: int
    state_bytes: int  # states that backward does not save as well
    rule_bytes: int  # the rule's own parameters and records
    backward_calls: int
    traffic: Traffic
    forecast_note: str  # the rule's note, if its work depends on values

    @property
    def kept_bytes(self) -> int:
        return self.peak_saved_bytes + self.state_bytes + self.rule_bytes

    def describe(self) -> str:
        forecast_note = f", counted {self.forecast_note}" if self.forecast_note else ""
        return (
            f"{self.peak_saved_bytes / 1e6:,.6g} MB saved for backward,"
            f" {self.state_bytes / 1e6:,.4g} MB of states, {self.traffic.flops / 1e9:,.6g} GFLOP,"
            f" {count_of(self.traffic.kernels, 'kernel')} that move {self.traffic.bytes / 1e9:,.4g}"
            f" GB{forecast_note}; the optimizer not among them"
        )


@dataclass(frozen=True, kw_only=True)
class TeacherCounts:
    """The counts of a teacher's answers for one batch."""

    teacher: str
    bytes: int  # weights and statistics
    precision: Precision
    traffic: Traffic


class FakeBench(Bench):
    """A bench at full size whose tensors have no values.

    Raises: ValueError if the network does not fit the data.
    """

    def __init__(self, recipe: Recipe, samples: int) -> None:
        self._describe(recipe, samples)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.network = self._fresh_network()
        data = tasks_of(recipe)[0].data
        with self.running(recipe.name):
            target_B = torch.empty(samples, dtype=torch.int64)
            self._set_batch(torch.empty(samples, *data.shape), target_B)

    @contextmanager
    def running(self, who: str) -> Iterator[None]:
        """Make tensors without values inside the block.

        Raises: ValueError if an operation depends on values.
        """
        try:
            with self._mode, _FixedAnswers(), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a solver's, about its values
                yield
        except RuntimeError as error:
            why = str(error).split("\n")[0]
            raise ValueError(
                f"{who}: a step must not depend on values to be counted; {why}"
            ) from error

    def copy_of_network(self) -> nn.Module:
        return self.without_values(self.network)

    def without_values(self, module: nn.Module) -> nn.Module:
        """A copy of a module whose tensors have no values."""
        fakes: dict[int, Any] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            with self._mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = fake
        with _disable_current_modes():
            return copy.deepcopy(module, fakes)

    def calibrate(self, rule: Rule, network: nn.Module) -> None:
        """Do nothing: thresholds are values."""


class _FixedAnswers(TorchDispatchMode):
    """Answers queries of values: True for a boolean, and 1 for a number.

    Gradients are then finite. A solver takes its maximum of iterations and then has converged. The
    mode also corrects an error of torch's fake tensors (2.13): batch norm in bf16 saves the mean
    and deviation of each channel in the dtype of its statistics, not in bf16.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.native_batch_norm.default:
                dtypes = [each.dtype for each in args[:5] if each is not None]
                widest = reduce(torch.promote_types, dtypes)
                result = (result[0], *(each.to(widest) for each in result[1:]))
            return result
        except DataDependentOutputException:
            if func.overloadpacket is torch.ops.aten.equal:
                return True
            if func.overloadpacket is torch.ops.aten._local_scalar_dense:
                return True if args[0].dtype == torch.bool else 1
            raise


def counted(bench: Bench, rule: Spec) -> Counts:
    """Count the second of two batches. Rules check the network on the first.

    On a bench with values, this is a measurement.

    Raises: ValueError if the rule cannot train the network or its work depends on values.
    """
    traffic = Traffic()

    def watch_second(step: int, meters: Meters) -> None:
        if step == 1:
            meters.watch(traffic)

    made, meters = bench.train(rule, 2, watch_second)
    return Counts(
        **bytes_of_batch(made, meters),
        backward_calls=meters.totals.backward_calls // 2,
        traffic=traffic,
        forecast_note=made.forecast_note,
    )


def counted_optimizer(bench: Bench) -> tuple[HeldBytes, Traffic]:
    """Bytes that training holds besides a rule's, and the work of one optimizer step."""
    with bench.running(bench.recipe.optimizer.label):
        network, optimizer = bench.stepped()
        with Traffic() as traffic:
            optimizer.step()
        return held_bytes(network, optimizer), traffic


def counted_teacher(recipe: Recipe, bench: FakeBench) -> TeacherCounts | None:
    """Counts of the recipe's teacher on the bench's batch; None without a teacher."""
    if recipe.teacher is None:
        return None
    teacher = untrained_teacher(recipe)
    with bench.running(teacher.label), torch.no_grad():
        fake = bench.without_values(teacher)
        with Traffic() as traffic:
            fake(bench.x_B)
    return TeacherCounts(
        teacher=teacher.label,
        bytes=teacher_bytes(teacher),
        precision=teacher.precision,
        traffic=traffic,
    )


def describe_steps(recipes: Sequence[Recipe], workers: int) -> list[str]:
    """One line per recipe: the counts of a worker's micro-batch, or why they are unknown."""
    known: list[tuple[object, str]] = []
    for recipe in recipes:
        samples = recipe.split(workers).micro_batch
        key = (step_inputs(recipe), recipe.rule, samples)
        line = next((line for each, line in known if each == key), None)
        if line is None:
            say_stage(f"counting a step of {recipe.name}")
            try:
                counts = counted(FakeBench(recipe, samples), recipe.rule)
                line = f"{count_of(samples, 'sample')} on one worker: {counts.describe()}"
            except ValueError as error:
                line = f"not counted: {error}"
        known.append((key, line))
    return [line for _, line in known]


def _moves_nothing(func: Any) -> bool:
    """Whether an operation is a view or a query of a tensor's properties."""
    if func.is_view or func.namespace == "prim":
        return True
    aten = torch.ops.aten
    return func.overloadpacket in (aten.detach, aten._unsafe_view, aten.as_strided_, aten.empty)


def _bytes(values: Any) -> int:
    """Bytes of the numbers read or written. The numbers of an expanded tensor count once."""
    total = 0
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            own = value.numel()
            for size, stride in zip(value.shape, value.stride(), strict=True):
                if stride == 0 and size > 1:
                    own //= size
            total += own * value.element_size()
    return total
