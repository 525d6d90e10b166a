"""Seven questions about a spiking network, each answered on one batch in float64.

    batch       does the answer to a sample depend on the others of its batch (evaluation mode)?
    slices      do T steps in one call equal T calls on one step?
    state       does a batch leave state behind for the next one?
    gradients   is each gradient the derivative, with the surrogates taken as given?
    activity    which layers never or always fire, and which parameters get no gradient?
    norms       does batch norm differ between training and evaluation?
    time        does each layer of neurons carry state from step to step?

Each run has its own copy of the network, without dropout. A silent network would hide its faults.
So the copies for all questions but `activity` and `norms` differ from the network: a parameter
whose values are all 0 gets random values, and the running statistics of a norm are those of the
batch.

Two runs are compared module by module. The module at fault is the first one, in the order in which
the modules end, whose output differs although its inputs are equal (up to rounding).

The gradient of each module is checked alone, on the input that the module has in the network:

    neurons (LIF)      its gradient equals that of an unrolling, a loop over its equations
    smooth modules     its gradient equals central differences. Neurons inside the module are
                       replaced by a sine
    other modules      (with a step function, such as a neuron with equations of its own) the
                       gradient is not 0 for an input, or for its earlier steps, if a small change
                       of them changes the output, or its last step
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pipeline.core.checks import require
from pipeline.core.units import first_few
from pipeline.models.foreign.wrap import ACCEPTED
from pipeline.rules.base import refuse_whole_sequence_modules
from pipeline.rules.sltt import SLTT
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.encode import is_static, repeat
from pipeline.spiking.neuron import LIF, PLIF, named_neurons
from pipeline.spiking.norm import BatchNorm, is_foreign_norm
from pipeline.spiking.rate import WeightedRates
from pipeline.spiking.state import copies_without_graph, fresh_state, set_temporarily
from pipeline.spiking.synapse import is_inside

# T time, B batch, C channels, N other dimensions

ROUNDING = 1e-9  # relative to the largest value of a module
SMALLEST = 1e-12  # smaller differences and relative gradients count as 0
SLOPE_ERROR = 1e-4  # relative error of central differences
NO_GRADIENT = 1e-3  # of a neuron; the peak of most surrogates is about 1
NEAR, FAR = 1.0, 10.0  # distances of running statistics (`_distance`)
_ROOT = "the network itself"
# Operations with a derivative of 0 almost everywhere. A module with one has a surrogate.
_STEPS = {"ge", "gt", "le", "lt", "sign", "sgn", "heaviside", "round", "floor", "ceil", "trunc"}

# The fields of a Verdict after the first.
_Answer = tuple[Any, ...]
# Whether two tensors are equal up to a tolerance; None if their shapes cannot be compared.
_Same = Callable[[Tensor, Tensor, float], bool | None]


@dataclass(frozen=True)
class Verdict:
    """The answer to one question. `module` is the name of the module at fault, or ""."""

    question: str
    state: Literal["ok", "note", "fault"]
    text: str
    module: str = ""
    advice: str = ""

    def __str__(self) -> str:
        sentence = ": ".join(filter(None, (self.module, self.text)))
        return f"{self.state:5}  {self.question:9}  " + "; ".join(
            filter(None, (sentence, self.advice))
        )


def check(network: nn.Module, x_TB: Tensor) -> tuple[Verdict, ...]:
    """Answer the questions of this file for `network` on the batch `x_TB`, `[T, B, ...]`.

    The network maps `[T, B, ...]` to `[T, B, ...]`. Network, buffers and torch's random state stay
    as they are.

    Raises: ValueError unless the input has at least 2 steps and 2 samples, and the network runs on
    it in float64 with finite values.
    """
    packages = {type(module).__module__.partition(".")[0] for module in network.modules()}
    foreign = packages & ACCEPTED.keys()
    require(
        named_neurons(network) or not foreign,
        f"check: the neurons must be ours; got modules of {', '.join(foreign)};"
        " pipeline.wrap(network) makes a network that can be checked",
    )
    shape = tuple(x_TB.shape) if isinstance(x_TB, Tensor) else type(x_TB).__name__
    require(
        isinstance(x_TB, Tensor) and x_TB.dim() >= 3 and min(x_TB.shape[:2]) >= 2,
        f"check: the input must be [T, B, ...] with at least 2 steps and 2 samples; got {shape}",
    )
    old_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng([x_TB.device] if x_TB.is_cuda else []):
            return tuple(_Check(network, x_TB).answers())
    finally:
        torch.set_default_dtype(old_dtype)


class _Failed(Exception):
    """A run raised an error. `module` is the innermost module that was running."""

    def __init__(self, error: Exception, module: str = _ROOT) -> None:
        super().__init__(f"{type(error).__name__}: {' '.join(str(error).split())}")
        self.module = module


# ------------------------------------------------------------------------------------------- runs


@dataclass
class _Call:
    """A call of a module: copies of its arguments (by position, by keyword) and of the floats in
    them at the beginning, and of the floats in its output.
    """

    name: str
    arguments: Any
    inputs: list[Tensor]
    outputs: list[Tensor]


class _Run:
    """One run of a copy of the network. `calls` have the order in which they ended."""

    def __init__(
        self, network: nn.Module, x_TB: Tensor, *, in_slices: bool = False, has_graph: bool = False
    ) -> None:
        self.calls: list[_Call] = []
        self.overwriting: list[str] = []  # modules that changed their input
        self._running: list[tuple[str, Any]] = []
        for name, module in _by_name(network).items():
            module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            module.register_forward_hook(self._leave, with_kwargs=True)
        torch.manual_seed(0)
        x_TB = x_TB if is_static(x_TB) else x_TB.clone()  # the network may overwrite it
        try:
            with torch.set_grad_enabled(has_graph), fresh_state(network):
                parts = x_TB.split(1) if in_slices else [x_TB]
                self.y_TB = torch.cat([network(part_TB) for part_TB in parts])
            if has_graph:
                (self.y_TB * _random(self.y_TB, 1)).sum().backward()
        except Exception as error:
            names = [name for name, _ in self._running[-1:]] or self.overwriting or [_ROOT]
            raise _Failed(error, names[0]) from error

    def _enter(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._running.append((name, _copies((args, kwargs))))

    def _leave(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name, arguments = self._running.pop()
        inputs = _floats(arguments)
        if not all(map(torch.equal, inputs, _floats((args, kwargs)))):
            self.overwriting.append(name)
        self.calls.append(_Call(name, arguments, inputs, _floats(_copies(output))))

    def joined(self) -> dict[str, _Call]:
        """The calls of each module as one call with the steps of all, by the module's name."""
        by_name: dict[str, list[_Call]] = {}
        for call in self.calls:
            by_name.setdefault(call.name, []).append(call)
        return {
            name: _Call(
                name,
                calls[0].arguments,
                [_join(parts) for parts in zip(*(call.inputs for call in calls), strict=False)],
                [_join(parts) for parts in zip(*(call.outputs for call in calls), strict=False)],
            )
            for name, calls in by_name.items()
        }


def _join(parts: tuple[Tensor, ...]) -> Tensor:
    can_join = parts[0].dim() > 0 and len({part.shape[1:] for part in parts}) == 1
    return torch.cat(parts) if can_join else parts[0]


def _by_name(network: nn.Module) -> dict[str, nn.Module]:
    return {name or _ROOT: module for name, module in network.named_modules()}


def _copies(values: Any) -> Any:
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, values)


def _floats(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]


def _random(x: Tensor, seed: int) -> Tensor:
    """Normally distributed values in the shape of `x`."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)


def _in_float64(_: nn.Module, __: Any, output: Any) -> Any:
    """A forward hook, because some neurons return their spikes in fp32."""
    return tree_map(lambda y: y.double() if _floats(y) else y, output)


def _copy(network: nn.Module, training: bool | None = None) -> nn.Module:
    """A copy, without dropout in training mode."""
    network = copy.deepcopy(network, copies_without_graph(network))
    if training is not None:
        network.train(training)
        for module in network.modules():
            module.training &= not isinstance(module, (_DropoutNd, Dropout))
    return network


# ------------------------------------------------------------------------------ two runs compared


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool | None:
    if a.shape != b.shape:
        return None
    return torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True)


def _same_sample(
    a: Tensor, b: Tensor, tolerance: float, *, row: int, samples: int, outer: int | None
) -> bool | None:
    """Whether sample `row` of the `samples` samples in `a` equals the only sample in `b`.

    One dimension of `a` is `samples` times as long as in `b`. It may have other values, such as
    steps, folded into it: `outer` of them before the samples (None: all), and the others after.
    """
    if a.dim() != b.dim() or a.shape == b.shape:
        return _same(a, b, tolerance)
    at = next(at for at, size in enumerate(a.shape) if size != b.shape[at])
    size = b.shape[at]
    if a.shape != (*b.shape[:at], samples * size, *b.shape[at + 1 :]):
        return None
    before = size if outer is None else outer if size % outer == 0 else 1
    rows = a.unflatten(at, (before, samples, -1)).select(at + 1, row).flatten(at, at + 1)
    return _same(rows, b, tolerance)


def _differing(first: _Run, second: _Run, sames: Sequence[_Same] = (_same,)) -> str:
    """The module at fault (see the head of the file); "" if there is none.

    Its outputs must differ for each of `sames` for which its inputs are equal.
    """
    pairs = list(zip(first.calls, second.calls, strict=False))
    if len(first.calls) != len(second.calls) or any(a.name != b.name for a, b in pairs):
        others = second.joined()
        pairs = [(call, others[name]) for name, call in first.joined().items() if name in others]
    for a, b in pairs:
        tolerance = ROUNDING * _largest([*a.inputs, *a.outputs]) + SMALLEST
        inputs = list(zip(a.inputs, b.inputs, strict=False))
        outputs = list(zip(a.outputs, b.outputs, strict=False))
        fitting = [same for same in sames if all(same(*each, tolerance) for each in inputs)]
        if fitting and all(
            any(same(*each, tolerance) is False for each in outputs) for same in fitting
        ):
            return a.name
    return ""


def _largest(tensors: list[Tensor]) -> float:
    """The largest finite absolute value."""
    largest = (float(x.detach().nan_to_num(0, 0, 0).abs().max()) for x in tensors if x.numel())
    return max(largest, default=0.0)


# -------------------------------------------------------------------------------- one module alone


class _Alone:
    """A module of a copy of the network, and the arguments that it is called with.

    `variables` are the floats in the arguments. Errors of a call become `_Failed`.
    """

    def __init__(self, module: nn.Module, arguments: Any) -> None:
        self.module, self.arguments = module, _copies(arguments)
        self.variables = [x.requires_grad_() for x in _floats(self.arguments)]

    def outputs(self) -> list[Tensor]:
        torch.manual_seed(0)
        args, kwargs = tree_map(  # the module may overwrite them
            lambda x: x.clone() if isinstance(x, Tensor) else x, self.arguments
        )
        try:
            with fresh_state(self.module):
                return _floats(self.module(*args, **kwargs))
        except Exception as error:
            raise _Failed(error) from error

    def moved(self, x: Tensor, direction: Tensor) -> list[Tensor]:
        """The outputs for `x + direction` in place of the variable or parameter `x`."""
        value = x.detach().clone()
        x.data.add_(direction)
        try:
            with torch.no_grad():
                return self.outputs()
        finally:
            x.data.copy_(value)


def _gradient(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `(y * weight).sum()` with respect to `x`; 0 without a path."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    (g,) = torch.autograd.grad(y, x, weight, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if g is None else g


def _unrolled(lif: LIF, x_TB: Tensor) -> Tensor:
    """The spikes of `lif` by its equations (`spiking/neuron.py`), for `custom_forward`."""
    v_B, learnt_decay, spikes = lif.membrane(x_TB), lif.learnt_decay(), []
    decay = lif.decay if learnt_decay is None else learnt_decay
    fires = torch.gt if lif.comparison == ">" else torch.ge
    for x_B in x_TB.unbind(0):
        u_B = decay * v_B + ((1 - decay) * x_B if lif.scale_input else x_B)
        a_B = u_B - lif.threshold
        slope_B = lif.surrogate.derivative(a_B.detach().clone())
        # The value is 0 or 1, and the derivative is the surrogate's.
        s_B = fires(a_B, 0).to(a_B) + slope_B * (a_B - a_B.detach())
        reset_B = s_B if lif.reset_gradient == "kept" else s_B.detach()
        v_B = u_B - lif.subtract * reset_B if lif.reset == "subtract" else u_B * (1 - reset_B)
        spikes.append(s_B)
    return torch.stack(spikes)


def _unrolling_error(lif: LIF, arguments: Any) -> float | None:
    """The relative error of a neuron's gradient; None for a neuron with equations of its own."""
    alone = _Alone(lif, arguments)
    (y_TB,) = alone.outputs()
    try:
        with set_temporarily([lif], "custom_forward", _unrolled):
            (reference_TB,) = alone.outputs()
    except _Failed:
        return None
    if not _same(y_TB, reference_TB, ROUNDING * _largest([y_TB])):
        return math.inf if type(lif) in (LIF, PLIF) else None
    errors, weight = [], _random(y_TB, 1)
    for x in (*alone.variables, *lif.parameters()):
        expected = _gradient(reference_TB, x, weight)
        error = (_gradient(y_TB, x, weight) - expected).norm() / (expected.norm() + SMALLEST)
        errors.append(float(error))
    return max(errors)


class _Steps(TorchDispatchMode):
    """Records whether a step function of floats ran."""

    ran = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran |= func._schema.name.removeprefix("aten::") in _STEPS and bool(_floats(args[:1]))
        return func(*args, **(kwargs or {}))


def _slope_error(module: nn.Module, arguments: Any) -> float | None:
    """The relative error of the gradient of a smooth module; None for a module with a step.

    It is the smallest of up to three errors, because a difference across a kink, such as ReLU's, is
    not the derivative. Noise takes the arguments off kinks: spikes are on those of a max pool.
    """
    smallest = math.inf
    for seed in range(3):
        alone = _Alone(module, arguments)
        for x in alone.variables:
            x.data.add_(_random(x, seed), alpha=0.01 * _largest([x]))
        with _Steps() as steps:
            y_N = _flat(alone.outputs())
        if steps.ran:
            return None
        errors = [0.0]
        for x in (*alone.variables, *module.parameters(recurse=False)):
            direction = 1e-6 * (_largest([x]) or 1.0) * _random(x, -seed - 1)
            change_N = _flat(alone.moved(x, direction)) - _flat(alone.moved(x, -direction))
            size = float(change_N.norm())
            if size > 1e-10 * float(y_N.detach().norm()):  # else rounding is a large part of it
                slope = 2 * (_gradient(y_N, x, change_N / size) * direction).sum()
                errors.append(abs(float(slope) / size - 1))
        smallest = min(smallest, max(errors))
        if smallest <= SLOPE_ERROR:
            break
    return smallest


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in tensors])


def _detaches(module: nn.Module, arguments: Any, steps: int) -> bool:
    """Whether an input, or its earlier steps, change the output, or its last step, without a
    gradient.
    """
    alone = _Alone(module, arguments)
    y, whole = alone.outputs()[0], slice(None)
    for x in alone.variables:
        parts = [(whole, whole)]
        if x.dim() and y.dim() and len(x) == len(y) == steps:
            parts.append((slice(-1), slice(-1, None)))
        for early, late in parts:
            direction, weight = torch.zeros_like(x), torch.zeros_like(y)
            direction[early] = 0.1 * _largest([x]) * _random(x[early], 1)
            weight[late] = _random(y[late], 2)
            has_effect = not _same(alone.moved(x, direction)[0][late], y[late], SMALLEST)
            if has_effect and not _gradient(y, x, weight)[early].any():
                return True
    return False


# ----------------------------------------------------------------------------------- the questions


class _Check:
    """`network` is a copy in float64. `awake` also has random values and the batch's statistics, as
    the head of the file says.
    """

    def __init__(self, network: nn.Module, x_TB: Tensor) -> None:
        self.steps, self.samples = x_TB.shape[:2]
        self.x_TB = x_TB.detach().double() if x_TB.is_floating_point() else x_TB
        if is_static(x_TB):
            self.x_TB = repeat(self.x_TB[0].clone(), self.steps)
        self.network = _copy(network).double()
        for module in self.network.modules():
            module.register_forward_hook(_in_float64)
        try:
            y_TB = _Run(_copy(self.network, training=False), self.x_TB).y_TB
            self.awake = self._awake()
            self.neurons = self._neurons()
        except _Failed as error:
            raise ValueError(
                "check: the network must run on the batch in float64, and return one tensor; got"
                f" {error} at {error.module}"
            ) from error
        require(
            y_TB.shape[:2] == x_TB.shape[:2] and y_TB.isfinite().all(),
            "check: the network must map [T, B, ...] to finite values [T, B, ...]; got shape"
            f" {tuple(y_TB.shape)} for {tuple(x_TB.shape)}",
        )

    def _awake(self) -> nn.Module:
        awake = _copy(self.network)
        for seed, parameter in enumerate(awake.parameters()):
            if not parameter.any():
                size = 1.0 if parameter.dim() == 1 else 0.1  # biases make neurons fire
                parameter.data.add_(_random(parameter, seed), alpha=size)
        trained = _copy(awake, training=True)
        norms = {name: norm for name, norm in _by_name(trained).items() if _is_norm(norm)}
        for norm in norms.values():
            norm.momentum = 1.0  # type: ignore[assignment]
        _Run(trained, self.x_TB)
        for name, module in _by_name(awake).items():
            if name in norms:
                module.load_state_dict(norms[name].state_dict())
        return awake

    def _neurons(self) -> list[str]:
        """The names of all LIF, and of modules that map values `[T, B, ...]` to 0 and 1."""
        network, found = _copy(self.awake, training=True), list[str]()
        modules = _by_name(network)
        for name, call in _Run(network, self.x_TB).joined().items():
            is_innermost = name != _ROOT and not any(is_inside(each, [name]) for each in found)
            if isinstance(modules[name], LIF) or (
                is_innermost
                and [x.shape[:2] for x in call.inputs + call.outputs] == [self.x_TB.shape[:2]] * 2
                and list(map(_is_binary, call.inputs + call.outputs)) == [False, True]
            ):
                found.append(name)
        return found

    def answers(self) -> Iterator[Verdict]:
        for question, answer in (
            ("batch", self._batch),
            ("slices", self._slices),
            ("state", self._state),
            ("gradients", self._gradients),
            ("activity", self._activity),
            ("norms", self._norms),
            ("time", self._time),
        ):
            try:
                yield Verdict(question, *answer())
            except _Failed as error:
                yield Verdict(question, "fault", f"the network fails with {error}", error.module)

    def _batch(self) -> _Answer:
        whole, found = _Run(_copy(self.awake, training=False), self.x_TB), dict[str, int]()
        for row in sorted({0, self.samples // 2, self.samples - 1}):
            alone = _Run(_copy(self.awake, training=False), self.x_TB[:, row : row + 1])
            sames = [
                partial(_same_sample, row=row, samples=self.samples, outer=outer)
                for outer in (self.steps, 1, None)
            ]
            found.setdefault(_differing(whole, alone, sames), row)
        # For some samples, the fault may be visible only in a module around the one at fault.
        for module in whole.joined():
            if module in found:
                return (
                    "fault",
                    f"its output for sample {found[module]} depends on the other samples",
                    module,
                    "keep samples apart: a neuron needs [T, B, ...], steps first, and a norm needs"
                    " running statistics",
                )
        return "ok", "the answer to a sample does not depend on the others of its batch"

    def _slices(self) -> _Answer:
        if any(isinstance(module, WeightedRates) for module in self.network.modules()):
            return "note", "not asked: WeightedRates need all steps in one call"
        refusal = ""
        try:
            refuse_whole_sequence_modules(SLTT(), self.network)
        except ValueError as error:
            refusal = str(error).partition(": ")[2]
        for training in (False,) if refusal else (False, True):
            at_once = _Run(_copy(self.awake, training), self.x_TB)
            in_slices = _Run(_copy(self.awake, training), self.x_TB, in_slices=True)
            if module := _differing(at_once, in_slices):
                return (
                    "fault",
                    f"{self.steps} calls on one step differ from one call on {self.steps} steps",
                    module,
                    "keep its state in a pipeline.spiking.state.State, and use no other steps",
                )
        if refusal:
            return "note", f"equal in evaluation; not asked in training: {refusal}"
        return "ok", f"{self.steps} calls on one step equal one call on {self.steps} steps"

    def _state(self) -> _Answer:
        for training in (False, True):
            fresh, used = _copy(self.awake, training), _copy(self.awake, training)
            other_TB = self.x_TB.flip(1)
            with torch.no_grad(), fresh_state(used):
                used(1.5 * other_TB if other_TB.is_floating_point() else other_TB)
            if training:  # buffers may change in training: running statistics, power iterations
                for left, at_first in zip(used.buffers(), fresh.buffers(), strict=True):
                    left.data = at_first.clone()
            if module := _differing(_Run(fresh, self.x_TB), _Run(used, self.x_TB)):
                return (
                    "fault",
                    "its output depends on the batch before",
                    module,
                    "keep its state in a pipeline.spiking.state.State, which fresh_state clears",
                )
        return "ok", "a batch leaves no state behind for the next one"

    def _gradients(self) -> _Answer:
        own = _Run(_copy(self.awake, training=True), self.x_TB)
        network = _copy(self.awake, training=True)
        modules, lifs = _by_name(network), [lif for _, lif in named_neurons(network)]
        errors: dict[str, float | None] = {}
        for name, call in own.joined().items():
            module, problem = modules[name], ""
            if not call.outputs:
                continue
            try:
                if isinstance(module, LIF):
                    arguments, limit = (tuple(call.inputs), call.arguments[1]), ROUNDING
                    error = errors[name] = _unrolling_error(module, arguments)
                else:
                    arguments, limit = call.arguments, SLOPE_ERROR
                    with set_temporarily(lifs, "custom_forward", _sine):
                        error = _slope_error(module, arguments)
                if error is None and _detaches(module, arguments, self.steps):
                    problem = "is 0 where a change has an effect"
                elif error is not None and error > limit:
                    problem = f"is wrong (relative error {error:.1g})"
            except _Failed:
                continue  # it cannot run alone, and is checked as a part of other modules
            except RuntimeError as error:
                problem = f"fails with {_Failed(error)}"
            if problem:
                inside = [x for x in own.overwriting if name == _ROOT or is_inside(x, [name])]
                return (
                    "fault",
                    f"its gradient {problem}",
                    inside[0] if inside else name,
                    "look for detach, .data, no_grad, writes in place and custom backwards",
                )
        worst = max((error for error in errors.values() if error is not None), default=0.0)
        return "ok", f"right; the relative error of a layer of neurons is at most {worst:.0g}"

    def _activity(self) -> _Answer:
        network = _copy(self.network, training=True)
        run = _Run(network, self.x_TB, has_graph=True)
        modules, calls, notes = _by_name(network), run.joined(), list[str]()
        for name in self.neurons:
            fires_RN = calls[name].outputs[0].flatten(0, 1).unsqueeze(-1).flatten(1) != 0
            for word, is_so_N in (("never", ~fires_RN.any(0)), ("always", fires_RN.all(0))):
                share = float(is_so_N.double().mean())
                if share == 1 and _blocks(modules[name], calls[name]):
                    return (
                        "fault",
                        f"all its neurons {word} fire, and no gradient passes through them",
                        name,
                        "change its threshold, or scale its input (norm, initial weights)",
                    )
                if share > 0.5:
                    notes.append(f"{share:.0%} of {name} {word} fire")
        gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
        if missing := [name for name, g in gradients.items() if g is None]:
            return (
                "fault",
                f"no gradient reaches {first_few(missing, 3)}",
                missing[0].rpartition(".")[0] or _ROOT,
                "use it in the forward without detach, or set requires_grad=False",
            )
        sizes = {name: float(g.norm()) for name, g in gradients.items() if g is not None}
        if zero := [name for name in sizes if sizes[name] <= SMALLEST * max(sizes.values())]:
            notes.append(f"the gradient of {first_few(zero, 3)} is 0")
        if notes:
            return "note", first_few(notes, 3)
        return "ok", "most neurons of each layer fire, and each parameter gets a gradient"

    def _norms(self) -> _Answer:
        network, notes = _copy(self.network, training=True), list[str]()
        calls, trained = _Run(network, self.x_TB).joined(), _by_name(network)
        for name, norm in _by_name(self.network).items():
            if not _is_norm(norm) or name not in calls or norm.running_mean is None:
                continue
            old, new = norm.state_dict(), trained[name].state_dict()
            is_updated = not torch.equal(old["running_var"], new["running_var"])
            away, outside = _distances(norm, calls[name].inputs[0])
            if outside > FAR or not (is_updated or getattr(norm, "frozen", False)):
                problem = "are far from the batch's" if is_updated else "do not change in training"
                return (
                    "fault",
                    f"its running statistics {problem} (distance {away:.2g})",
                    name,
                    "train on data like these, with a momentum above 0",
                )
            if away > NEAR:
                notes.append(f"{name} is {away:.1f} standard deviations from the batch")
            if getattr(norm, "over", "time") == "time":
                notes.append(f"{name} has one mean and variance for all steps")
        if notes:
            return "note", f"training and evaluation differ: {first_few(notes, 2)}"
        return "ok", "running statistics are near the batch's"

    def _time(self) -> _Answer:
        network = _copy(self.awake, training=True)
        run = _Run(network, torch.stack([self.x_TB[0]] * self.steps))
        modules, calls = _by_name(network), run.joined()
        for name in self.neurons:
            if not _carries(modules[name], calls[name]):
                return (
                    "fault",
                    "for a constant input its spikes are the same at each step",
                    name,
                    "keep its membrane from step to step (decay above 0)",
                )
        if not self.neurons:
            return "fault", "no module returns spikes, so T has no effect", _ROOT, "add neurons"
        if _same(run.y_TB, run.y_TB[:1].expand_as(run.y_TB), SMALLEST):
            return "note", "neurons carry state, but for a constant input no answer changes with T"
        return "ok", "the answer changes with T; each layer of neurons carries state"


def _sine(_: LIF, x_TB: Tensor) -> Tensor:
    """Instead of spikes. Its backward keeps neither input nor output, which may be overwritten."""
    return x_TB.clone().sin()


def _is_binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, BatchNorm) or is_foreign_norm(module)


def _blocks(module: nn.Module, call: _Call) -> bool:
    """Whether no gradient of a relevant size passes from the output of a neuron to its input."""
    alone = _Alone(module, (tuple(call.inputs), call.arguments[1]))
    (y_TB,) = alone.outputs()
    return _largest([_gradient(y_TB, alone.variables[0], _random(y_TB, 1))]) < NO_GRADIENT


def _carries(module: nn.Module, call: _Call) -> bool:
    """Whether the output of a neuron for a constant input changes from step to step, or is 0.

    Inputs of several sizes are tried, because few neurons can all fire at each step, or at none.
    """
    x_B, is_silent = call.inputs[0][0], True
    for seed in range(20):
        constant_TB = torch.stack([(3 * _random(x_B, seed)).exp()] * 8)
        (y_TB,) = _Alone(module, ((constant_TB,), call.arguments[1])).outputs()
        if not _same(y_TB, y_TB[:1].expand_as(y_TB), SMALLEST):
            return True
        is_silent &= not y_TB.any()
    return is_silent


def _distances(norm: Any, x: Tensor) -> tuple[float, float]:
    """The distance of the running statistics from those of the batch, and from all values between
    these and the initial ones, 0 and 1.

    It is the larger of two numbers: the difference of the means in standard deviations of the
    batch, and the ratio of the standard deviations minus 1. The median over channels is returned.
    """
    x_NC = x.flatten(0, 1) if isinstance(norm, BatchNorm) else x
    var_C, mean_C = torch.var_mean(x_NC, [0, *range(2, x_NC.dim())], correction=0)
    distances = []
    for other_mean_C, other_var_C in ((mean_C, var_C), (0 * mean_C, 0 * var_C + 1)):
        near_mean_C, near_var_C = (
            running_C.clamp(batch_C.minimum(other_C), batch_C.maximum(other_C))
            for running_C, batch_C, other_C in (
                (norm.running_mean, mean_C, other_mean_C),
                (norm.running_var, var_C, other_var_C),
            )
        )
        difference_C = (norm.running_mean - near_mean_C).abs() / (var_C + norm.eps).sqrt()
        ratio_C = ((norm.running_var + norm.eps) / (near_var_C + norm.eps)).log().abs() / 2
        distances.append(float(difference_C.maximum(ratio_C.exp() - 1).median()))
    return distances[0], distances[1]
