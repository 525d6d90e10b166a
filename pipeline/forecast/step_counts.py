"""Counts of one training step at full size, on tensors with shapes but without values.

    bench = FakeBench(recipe, samples)
    count_rule(bench, spec(SLTT)).kernel_log.kernels

The counts are bytes saved for backward, bytes of states, floating-point operations, kernels, and
the bytes that kernels move. Nothing is computed and no data is read, so a step of any size takes
only the time of its Python code. torch's fake tensors report a CPU as their device, so the code for
a CPU is counted. The counts equal those of a measured step, with two exceptions:

    IDE      a solver takes its maximum number of iterations; in a measured step it may stop earlier
    SPIDE    a linear feedback is a dense product, as on a GPU; a CPU skips silent neurons

Thresholds that a rule calibrates on data affect only values, so no rule is calibrated here.
"""

# B batch

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from pipeline.core.stages import say_stage
from pipeline.core.units import counted
from pipeline.data.base import Batch
from pipeline.forecast.bench import Bench, RuleBytes, bytes_of_batch, step_inputs
from pipeline.measure.operations import Pausable, tensors_in
from pipeline.measure.saved_bytes import HeldBytes, held_bytes
from pipeline.models.teachers.base import Teacher
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.train.tasks import tasks_of

# Operations that move no bytes, besides views and queries of a tensor's properties.
_ATEN = torch.ops.aten
_FREE = (
    *(_ATEN.detach, _ATEN._unsafe_view, _ATEN.as_strided_, _ATEN.empty, _ATEN.empty_like),
    *(_ATEN.empty_strided, _ATEN.new_empty, _ATEN.new_empty_strided),
)


@dataclass(frozen=True)
class Operation:
    """One operation of torch below autograd. It counts as one kernel."""

    flops: int
    bytes: int  # bytes read and written


class KernelLog(TorchDispatchMode, Pausable):
    """Records the kernels that torch calls below autograd inside the `with` block.

    It counts two floating-point operations per multiply-add of a product. Multiplications by zero
    count. Operations that are not products count as 0 FLOP. The bytes are those of inputs and
    outputs.
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
        moves_nothing = func.is_view or func.namespace == "prim" or func.overloadpacket in _FREE
        if not self.is_paused and not moves_nothing and any(True for _ in tensors_in(result)):
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count is not None else 0
            self.operations.append(Operation(int(flops), _moved_bytes([args, kwargs, result])))
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
class Counts(RuleBytes):
    """The counts of one rule on one batch, without the optimizer."""

    backward_calls: int
    kernel_log: KernelLog
    forecast_note: str  # the rule's note, if its work depends on values

    def describe(self) -> str:
        note = f", counted {self.forecast_note}" if self.forecast_note else ""
        return (
            f"{self.peak_saved_bytes / 1e6:,.6g} MB saved for backward,"
            f" {self.state_bytes / 1e6:,.4g} MB of states,"
            f" {self.kernel_log.flops / 1e9:,.6g} GFLOP,"
            f" {counted(self.kernel_log.kernels, 'kernel')} that move"
            f" {self.kernel_log.bytes / 1e9:,.4g} GB{note}; without the optimizer"
        )


class FakeBench(Bench):
    """A bench at full size whose tensors have no values.

    Raises: ValueError if the network does not fit the data.
    """

    calibrates = False  # thresholds change only values, which do not exist here

    def __init__(self, recipe: Recipe, samples: int) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._set_recipe(recipe, samples)
        with self.running(recipe.name):
            self._set_batch(
                Batch(
                    torch.empty(samples, *tasks_of(recipe)[0].data.shape),
                    torch.empty(samples, dtype=torch.int64),
                    torch.arange(samples),
                )
            )

    @contextmanager
    def running(self, subject: str) -> Iterator[None]:
        """Create tensors without values inside the block.

        Raises: ValueError if torch cannot run an operation, for example because it depends on
        values.
        """
        try:
            with self._mode, _FixedValues(), warnings.catch_warnings():
                # solvers warn about values that do not exist here
                warnings.simplefilter("ignore", RuntimeWarning)
                yield
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"{subject}: a counted step must not depend on values; {str(error).splitlines()[0]}"
            ) from error
        except RuntimeError as error:
            raise ValueError(
                f"{subject}: the step cannot be counted; {str(error).splitlines()[0]}"
            ) from error

    def copy_of_network(self) -> nn.Module:
        return self.without_values(self.network)

    def without_values(self, module: nn.Module) -> nn.Module:
        """A copy of a module whose tensors have no values."""
        fakes: dict[int, Any] = {}
        with self._mode:
            for tensor in (*module.parameters(), *module.buffers()):
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, tensor.requires_grad)
                fakes[id(tensor)] = fake
        with _disable_current_modes():
            return copy.deepcopy(module, fakes)


class _FixedValues(TorchDispatchMode):
    """Returns True for `torch.equal` and for a boolean that code reads, and 1 for a number.

    Gradients then count as finite. A solver takes its maximum number of iterations, and then counts
    as converged. The mode also corrects an error of torch's fake tensors (2.13): batch norm in bf16
    must save the mean and deviation of each channel in the dtype of its statistics, not in bf16.
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
            if func is _ATEN.native_batch_norm.default:
                widest = reduce(
                    torch.promote_types, (each.dtype for each in args[:5] if each is not None)
                )
                result = (result[0], *(each.to(widest) for each in result[1:]))
            return result
        except DataDependentOutputException:
            if func.overloadpacket is _ATEN.equal:
                return True
            if func.overloadpacket is _ATEN._local_scalar_dense:
                return True if args[0].dtype == torch.bool else 1
            raise


def count_rule(bench: Bench, rule: Spec) -> Counts:
    """Count the second of two batches. Some rules check the network on the first batch.

    On a bench with values, the counts are measured.

    Raises: ValueError if the rule cannot train the network or its work depends on values.
    """
    kernel_log = KernelLog()
    with bench.training(rule) as (built_rule, meters, train_once):
        train_once()
        meters.watch(kernel_log)
        train_once()
    return Counts(
        **bytes_of_batch(built_rule, meters),
        backward_calls=meters.totals.backward_calls // 2,
        kernel_log=kernel_log,
        forecast_note=built_rule.forecast_note,
    )


def count_optimizer(bench: Bench) -> tuple[HeldBytes, KernelLog]:
    """The bytes that training holds besides a rule's bytes, and the work of one optimizer step."""
    with bench.running(bench.recipe.optimizer.label):
        network, optimizer = bench.stepped()
        with KernelLog() as kernel_log:
            optimizer.step()
        return held_bytes(network, optimizer), kernel_log


def count_teacher(teacher: Teacher, bench: FakeBench) -> KernelLog:
    """The work of a teacher's predictions for the bench's batch."""
    with bench.running(teacher.label), torch.no_grad():
        fake = bench.without_values(teacher)
        with KernelLog() as kernel_log:
            fake(bench.x_B)
        return kernel_log


def describe_steps(recipes: Sequence[Recipe], workers: int) -> list[str]:
    """One line per recipe: the counts of a worker's micro-batch, or why they are unknown."""
    lines: dict[object, str] = {}
    described: list[str] = []
    for recipe in recipes:
        samples = recipe.split(workers).micro_batch
        key = (step_inputs(recipe), recipe.rule, samples)
        if key not in lines:
            say_stage(f"counting a step of {recipe.name}")
            try:
                counts = count_rule(FakeBench(recipe, samples), recipe.rule)
                lines[key] = f"{counted(samples, 'sample')} on one worker: {counts.describe()}"
            except ValueError as error:
                lines[key] = f"not counted: {error}"
        described.append(lines[key])
    return described


def _moved_bytes(values: Any) -> int:
    """The bytes of the tensors in `values`. Numbers that an expanded tensor repeats count once."""
    return sum(
        each.element_size()
        * math.prod(
            size
            for size, stride in zip(each.shape, each.stride(), strict=True)
            if stride or size < 2
        )
        for each in tensors_in(values)
    )
