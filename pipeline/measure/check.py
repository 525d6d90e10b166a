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
batch. A sine takes the place of a module whose output is random, such as a Poisson encoder.

Two runs are compared module by module. The module at fault is the first one, in the order in which
the modules end, whose output differs although its inputs are equal (up to rounding).

The gradient of each module is checked alone, on the input that the module has in the network:

    neurons (LIF)      its gradient equals that of an unrolling, a loop over its equations
    other neurons      (elementwise, with equations that the check does not know) the ratios of its
                       gradients by the inputs of each step, and by its parameters, are those of its
                       threshold (`_threshold_error`). The surrogate is taken as given, so a factor
                       common to all gradients is not found
    smooth modules     its gradient equals central differences. Neurons inside the module are
                       replaced by a sine
    other modules      (with a step function) the gradient is not 0 for an input, or for its earlier
                       steps, if a small change of them changes the output, or its last step. The
                       verdict names these modules, because their gradients are not checked further
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pipeline.core.checks import require
from pipeline.core.torch_settings import seed_torch
from pipeline.core.units import first_few
from pipeline.models.foreign.wrap import ACCEPTED
from pipeline.rules.base import refuse_whole_sequence_modules
from pipeline.rules.sltt import SLTT
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.encode import is_static, repeat
from pipeline.spiking.integer import IntegerNeuron
from pipeline.spiking.neuron import LIF, PLIF, named_neurons
from pipeline.spiking.norm import BatchNorm, is_foreign_norm
from pipeline.spiking.rate import WeightedRates
from pipeline.spiking.state import copies_without_graph, fresh_state, set_temporarily
from pipeline.spiking.synapse import is_inside

# T time, B batch, C channels, N other dimensions

ROUNDING = 1e-9  # relative to the largest value of a module
SMALLEST = 1e-12  # smaller differences and relative gradients count as 0
WRONG = 1e-4  # relative error of a gradient; central differences have a smaller one
NO_GRADIENT = 1e-3  # of a neuron; the peak of most surrogates is about 1
FAR_CURRENT, LARGEST_CURRENT = 1e6, 1e9  # most thresholds are about 1
NEAR, FAR = 1.0, 10.0  # distances of running statistics (`_distance`)
_ROOT = "the network itself"
# Operations with a derivative of 0 almost everywhere. A module with one has a surrogate.
_STEPS = {"ge", "gt", "le", "lt", "sign", "sgn", "heaviside", "round", "floor", "ceil", "trunc"}


@dataclass(frozen=True)
class Verdict:
    """The answer to one question. `module` is the name of the module at fault, or ""."""

    question: str
    state: Literal["ok", "note", "fault"]
    text: str
    module: str = ""
    advice: str = ""

    def __str__(self) -> str:
        module, advice = self.module and f"{self.module}: ", self.advice and f"; {self.advice}"
        return f"{self.state:5}  {self.question:9}  {module}{self.text}{advice}"


def check(network: nn.Module, x_TB: Tensor) -> tuple[Verdict, ...]:
    """Answer the questions of this file for `network` on the batch `x_TB`, `[T, B, ...]`.

    The network maps `[T, B, ...]` to `[T, B, ...]`. Network, buffers and torch's random state stay
    as they are.

    Raises: ValueError unless the input has at least 2 steps and 2 samples, and the network runs on
    it in float64 with finite values.
    """
    foreign = {type(x).__module__.partition(".")[0] for x in network.modules()} & ACCEPTED.keys()
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
        self,
        network: nn.Module,
        x_TB: Tensor,
        *,
        in_slices: bool = False,
        has_graph: bool = False,
        seed: int = 0,
    ) -> None:
        self.calls: list[_Call] = []
        self._running: list[tuple[str, Any]] = []
        for name, module in _by_name(network).items():
            module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            module.register_forward_hook(self._leave)
        seed_torch(seed)
        x_TB = x_TB if is_static(x_TB) else x_TB.clone()  # the network may overwrite it
        try:
            with torch.set_grad_enabled(has_graph), fresh_state(network):
                self.y_TB = torch.cat(list(map(network, x_TB.split(1) if in_slices else [x_TB])))
            if has_graph:
                (self.y_TB * _random(self.y_TB, 1)).sum().backward()
        except Exception as error:
            raise _Failed(error, self._running[-1][0] if self._running else _ROOT) from error

    def _enter(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        copies = tree_map(
            lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (args, kwargs)
        )
        self._running.append((name, copies))

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        name, arguments = self._running.pop()
        outputs = [y.detach().clone() for y in _floats(output)]
        self.calls.append(_Call(name, arguments, _floats(arguments), outputs))

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


def _floats(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]


def _random(x: Tensor, seed: int) -> Tensor:
    """Normally distributed values in the shape of `x`."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)


def _sine(x: Tensor, **_: Any) -> Tensor:
    """Instead of spikes. Its backward keeps neither input nor output, which may be overwritten."""
    return x.clone().sin()


def _inside(name: str, names: Iterable[str]) -> list[str]:
    """The modules among `names` that are the module `name`, or inside of it."""
    return [each for each in names if name == _ROOT or is_inside(each, [name])]


def _copy(network: nn.Module, training: bool | None = None) -> nn.Module:
    """A copy. In training mode it has no dropout, and its spectral norms keep their vectors."""
    network = copy.deepcopy(network, copies_without_graph(network))
    if training is not None:
        network.train(training)
        for module in network.modules():
            names = [type(each).__name__ for each in (module, *module._forward_pre_hooks.values())]
            module.training &= not (
                isinstance(module, (_DropoutNd, Dropout))
                or any("SpectralNorm" in name for name in names)  # torch's module, or older hook
            )
    return network


# ------------------------------------------------------------------------------ two runs compared


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool | None:
    return (
        torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True) if a.shape == b.shape else None
    )


def _same_sample(
    a: Tensor, b: Tensor, tolerance: float, *, row: int, samples: int, steps: int
) -> bool | None:
    """Whether sample `row` of the `samples` samples in `a` equals the only sample in `b`.

    One dimension of `a` is `samples` times as long as in `b`. It may have other values, such as
    steps, folded into it: before the samples, after them, or steps before and other values after.
    """
    if a.dim() != b.dim() or a.shape == b.shape:
        return _same(a, b, tolerance)
    at = next(at for at, size in enumerate(a.shape) if size != b.shape[at])
    size = b.shape[at]
    if a.shape != (*b.shape[:at], samples * size, *b.shape[at + 1 :]):
        return None
    return any(
        _same(
            a.unflatten(at, (before, samples, -1)).select(at + 1, row).flatten(at, at + 1),
            b,
            tolerance,
        )
        for before in {size, steps, 1}
        if size % before == 0
    )


def _differing(first: _Run, second: _Run, same: Callable[..., bool | None] = _same) -> str:
    """The module at fault (see the head of the file); "" if there is none."""
    others = second.joined()
    for name, a in first.joined().items():
        b = others.get(name, _Call(name, (), [], []))
        tolerance = ROUNDING * _largest([*a.inputs, *a.outputs]) + SMALLEST
        inputs, outputs = (
            [same(*each, tolerance) for each in zip(*both, strict=False)]
            for both in ((a.inputs, b.inputs), (a.outputs, b.outputs))
        )
        if all(inputs) and False in outputs:
            return name
    return ""


def _largest(tensors: list[Tensor]) -> float:
    """The largest finite absolute value."""
    return max(
        (float(x.detach().nan_to_num(0, 0, 0).abs().max()) for x in tensors if x.numel()),
        default=0.0,
    )


# -------------------------------------------------------------------------------- one module alone


class _Alone:
    """A module outside of the network, called as in `call`. Each time, a copy of it is called.

    `variables` are the floats in the arguments. Errors of a call become `_Failed`.
    """

    def __init__(self, module: nn.Module, call: _Call) -> None:
        self.module, self.call = module, call
        self.variables = [
            x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in call.inputs
        ]
        self.parameters = {
            name: parameter.detach().clone().requires_grad_(parameter.requires_grad)
            for name, parameter in module.named_parameters(recurse=False)
        }

    def outputs(self) -> list[Tensor]:
        seed_torch(0)
        module, outputs = _copy(self.module), list[list[Tensor]]()
        leaves, form = tree_flatten(self.call.arguments)
        places = [at for at, leaf in enumerate(leaves) if _floats(leaf)]
        parts = [
            x.split(len(leaves[at])) if x.dim() else [x]
            for at, x in zip(places, self.variables, strict=False)
        ]
        try:
            with fresh_state(module):
                for inputs in list(zip(*parts, strict=False)) or [()]:
                    for at, x in zip(places, inputs, strict=False):
                        leaves[at] = x.clone()  # the module may overwrite it
                    args = tree_unflatten(leaves, form)
                    outputs.append(_floats(functional_call(module, self.parameters, *args)))
        except Exception as error:
            raise _Failed(error) from error
        return [_join(parts) for parts in zip(*outputs, strict=False)]

    def trainable(self) -> list[Tensor]:
        """The variables, and the parameters that are trained."""
        return self.variables + [x for x in self.parameters.values() if x.requires_grad]


def _gradient(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `(y * weight).sum()` with respect to `x`; 0 without a path."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(y, x, weight, retain_graph=True, materialize_grads=True)[0]


def _unrolled(lif: LIF, x_TB: Tensor) -> Tensor:
    """The spikes of `lif` by its equations (`spiking/neuron.py`), for `custom_forward`."""
    v_B, learnt_decay, spikes = lif.membrane(x_TB), lif.learnt_decay(), []
    decay = lif.decay if learnt_decay is None else learnt_decay
    for x_B in x_TB.unbind(0):
        u_B = decay * v_B + ((1 - decay) * x_B if lif.scale_input else x_B)
        a_B = u_B - lif.threshold
        fires_B = a_B > 0 if lif.comparison == ">" else a_B >= 0
        # The value is 0 or 1, and the derivative is the surrogate's.
        s_B = fires_B + lif.surrogate.derivative(a_B.detach().clone()) * (a_B - a_B.detach())
        reset_B = s_B if lif.reset_gradient == "kept" else s_B.detach()
        v_B = u_B - lif.subtract * reset_B if lif.reset == "subtract" else u_B * (1 - reset_B)
        spikes.append(s_B)
    lif.state.write("v", v_B)
    return torch.stack(spikes)


def _unrolling_error(lif: LIF, call: _Call) -> float | None:
    """The relative error of a neuron's gradient; None for a neuron with equations of its own."""
    alone = _Alone(lif, call)
    (y_TB,) = alone.outputs()
    with set_temporarily([lif], "custom_forward", _unrolled):
        (reference_TB,) = alone.outputs()
    if not _same(y_TB, reference_TB, ROUNDING * _largest([y_TB])):
        return math.inf if type(lif) in (LIF, PLIF) else None
    ours, theirs = (
        _flat([_gradient(each, x, _random(y_TB, 1)) for x in alone.trainable()])
        for each in (y_TB, reference_TB)
    )
    return float((ours - theirs).norm() / (theirs.norm() + SMALLEST))


@torch.no_grad()
def _threshold(alone: _Alone, x_TN: Tensor) -> Tensor:
    """The last current of each element at which it begins to fire, by bisection; `x_TN` gets it."""
    low_N, high_N = (x_TN[-1] * 0 + end for end in (-LARGEST_CURRENT, LARGEST_CURRENT))
    for _ in range(60):
        x_TN[-1] = (low_N + high_N) / 2
        fires_N = alone.outputs()[0].reshape(x_TN.shape)[-1] > 0
        low_N, high_N = low_N.where(fires_N, x_TN[-1]), x_TN[-1].where(fires_N, high_N)
    return x_TN[-1].clone()


def _threshold_error(neuron: nn.Module, call: _Call, steps: int) -> float | None:
    """The relative error of the gradient of a neuron with equations that are not known.

    The last current x[T] at which the neuron begins to fire depends on a variable w: a current of
    an earlier step, or a parameter. There, for each surrogate,

        ds[T]/dw + ds[T]/dx[T] dx[T]/dw = 0

    The result is None if elements depend on each other, or none begins to fire.
    """
    alone = _Alone(neuron, call)
    x_TN = alone.variables[0].data.view(steps, -1)
    # Far from the threshold, so that a small change of x does not change resets and surrogates.
    x_TN.copy_(_random(x_TN, 0).sign() * (1 + _random(x_TN, 1).abs()) * FAR_CURRENT)
    first_N = _threshold(alone, x_TN)
    y, is_chosen_N = alone.outputs()[0], _random(first_N, 2) > 0
    x_TN[:, ~is_chosen_N] *= -1
    has_same_TN = (alone.outputs()[0] == y).view(x_TN.shape)
    x_TN[:, ~is_chosen_N] *= -1
    weight_N = (is_chosen_N & (first_N.abs() < LARGEST_CURRENT / 2)).to(y)
    if not weight_N.any() or not has_same_TN[:, is_chosen_N].all():
        return None
    weight, errors = (
        nn.functional.pad(weight_N[None], (0, 0, steps - 1, 0)).view_as(y),
        list[float](),
    )
    last_N = _gradient(y, alone.variables[0], weight).view_as(x_TN)[-1]
    for x in alone.trainable():
        direction = 1e-5 * _largest([x]) * _random(x, 3).abs()
        if x is alone.variables[0]:
            direction.view_as(x_TN)[-1] = 0
        x.data.add_(direction)
        expected = float((last_N * (first_N - _threshold(alone, x_TN))).sum())
        x.data.sub_(direction)
        slope, rounding = (
            float(each.sum()) for each in (_gradient(y, x, weight) * direction, 1e-6 * last_N.abs())
        )
        errors.append(abs(slope - expected) / (abs(expected) + rounding) if rounding else math.inf)
    return max(errors)


class _Steps(TorchDispatchMode):
    """Records whether a step function of floats ran."""

    ran = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran |= func._schema.name.removeprefix("aten::").rstrip("_") in _STEPS and bool(
            _floats(args[:1])
        )
        return func(*args, **(kwargs or {}))


def _slope_error(module: nn.Module, call: _Call) -> float | None:
    """The relative error of the gradient of a smooth module; None for a module with a step.

    It is the smallest of up to three errors, because a difference across a kink, such as ReLU's, is
    not the derivative. Noise takes the arguments off kinks: spikes are on those of a max pool. A
    shorter step crosses fewer kinks, and a longer one has less rounding.
    """
    smallest = math.inf
    for seed, step in enumerate((1e-6, 1e-7, 1e-8)):
        alone = _Alone(module, call)
        for x in alone.variables:
            x.data.add_(_random(x, seed), alpha=0.01 * _largest([x]))
        with _Steps() as steps:
            y_N = _flat(alone.outputs())
        if steps.ran:
            return None
        errors = [0.0]
        for x in alone.trainable():
            direction = step * (_largest([x]) or 1.0) * _random(x, -seed - 1)
            x.data.add_(direction)
            change_N = _flat(alone.outputs())
            x.data.sub_(direction, alpha=2)
            change_N = (change_N - _flat(alone.outputs())).detach()
            x.data.add_(direction)
            size = float(change_N.norm())
            if size > 1e-4 * step * float(y_N.detach().norm()):  # else rounding is large
                slope = float((_gradient(y_N, x, change_N) * direction).sum()) / size**2
                errors.append(abs(2 * slope - 1))
        smallest = min(smallest, max(errors))
        if smallest <= WRONG:
            break
    return smallest


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in tensors])


# ----------------------------------------------------------------------------------- the questions


class _Check:
    """`network` is a copy in float64. `awake` also has random values, the batch's statistics and
    sines, as the head of the file says.

    `random` has the verdict on each module whose output is random in evaluation. `draws` has a
    module that draws random numbers in `awake` too, by mode (training: True).
    """

    def __init__(self, network: nn.Module, x_TB: Tensor) -> None:
        self.steps, self.samples = x_TB.shape[:2]
        self.x_TB = x_TB.detach().double() if x_TB.is_floating_point() else x_TB
        if is_static(x_TB):
            self.x_TB = repeat(self.x_TB[0].clone(), self.steps)
        self.network = _copy(network).double()
        self.norms = [
            name
            for name, module in _by_name(network).items()
            if (isinstance(module, BatchNorm) or is_foreign_norm(module))
            and getattr(module, "running_mean", None) is not None
        ]
        for module in self.network.modules():
            module.register_forward_hook(  # some neurons return their spikes in fp32
                lambda _, __, output: tree_map(lambda y: y.double() if _floats(y) else y, output)
            )
        try:
            y_TB = _Run(_copy(self.network, training=False), self.x_TB).y_TB
            self.awake = self._awake()
            self.random, self.draws = dict[str, str](), dict[bool, str]()
            for training in (False, True):
                self._replace_random(training)
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
                # Large biases make neurons fire.
                parameter.data = _random(parameter, seed) * (1.0 if parameter.dim() == 1 else 0.1)
        trained = _copy(awake, training=True)
        modules, norms = _by_name(awake), _by_name(trained)
        for name in self.norms:
            norms[name].momentum = 1.0  # type: ignore[assignment]
        _Run(trained, self.x_TB)
        for name in self.norms:
            modules[name].load_state_dict(norms[name].state_dict())
        return awake

    def _replace_random(self, training: bool) -> None:
        """An encoder, and a module with others in it, which may encode, are not at fault."""
        while training not in self.draws:
            first, second = (
                _Run(_copy(self.awake, training), self.x_TB, seed=seed) for seed in (0, 1)
            )
            if not (name := _differing(first, second)):
                return
            call, module = first.joined()[name], _by_name(self.awake)[name]
            is_whole = any(module.children())
            if not training:
                self.random[name] = (
                    "note" if is_whole or all(map(_is_binary, call.outputs)) else "fault"
                )
            if is_whole or [x.shape for x in call.inputs] != [y.shape for y in call.outputs]:
                self.draws[training] = name
            else:
                module.forward = _sine

    def _neurons(self) -> list[str]:
        """The names of all LIF, and of modules that map values `[T, B, ...]` to 0 and 1.

        A module may also be called on values `[B, ...]` for each step.
        """
        modules, whole, found = _by_name(self.awake), (self.steps, self.samples), list[str]()
        for name, call in _Run(_copy(self.awake, training=True), self.x_TB).joined().items():
            values = [*call.inputs, *call.outputs]
            if isinstance(modules[name], LIF) or (
                not _inside(name, found)
                and list(map(_is_binary, values)) == [False, True]
                and all(x.shape[:2] == whole or x.shape[:1] == (math.prod(whole),) for x in values)
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

    def _batch(self) -> tuple[Any, ...]:
        whole, found = _Run(_copy(self.awake, training=False), self.x_TB), dict[str, int]()
        for row in () if False in self.draws else sorted({0, self.samples // 2, self.samples - 1}):
            same = partial(_same_sample, row=row, samples=self.samples, steps=self.steps)
            one = _Run(_copy(self.awake, training=False), self.x_TB[:, row : row + 1])
            found.setdefault(_differing(whole, one, same), row)
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
        if self.random:
            module, state = min(self.random.items(), key=lambda item: item[1])  # faults first
            return state, "it draws random numbers in evaluation too", module
        return "ok", "the answer to a sample does not depend on the others of its batch"

    def _slices(self) -> tuple[Any, ...]:
        if any(isinstance(module, WeightedRates) for module in self.network.modules()):
            return "note", "not asked: WeightedRates need all steps in one call"
        refusals = {
            is_training: f"{name} draws random numbers" for is_training, name in self.draws.items()
        }
        try:
            refuse_whole_sequence_modules(SLTT(), self.network)
        except ValueError as error:
            refusals[True] = str(error).partition(": ")[2]
        for training in {False, True} - refusals.keys():
            at_once, in_slices = (
                _Run(_copy(self.awake, training), self.x_TB, in_slices=each)
                for each in (False, True)
            )
            if module := _differing(at_once, in_slices):
                return (
                    "fault",
                    f"{self.steps} calls on one step differ from one call on {self.steps} steps",
                    module,
                    "keep its state in a pipeline.spiking.state.State, and use no other steps",
                )
        if refusals:
            mode = "evaluation" if False in refusals else "training"
            return "note", f"not asked in {mode}: {next(iter(refusals.values()))}"
        return "ok", f"{self.steps} calls on one step equal one call on {self.steps} steps"

    def _state(self) -> tuple[Any, ...]:
        fresh, used = (_copy(self.awake, training=False) for _ in range(2))
        _Run(used, self.x_TB.flip(1) * (1.5 if self.x_TB.is_floating_point() else 1))
        if module := _differing(_Run(fresh, self.x_TB), _Run(used, self.x_TB)):
            return (
                "fault",
                "its output depends on the batch before",
                module,
                "keep its state in a pipeline.spiking.state.State, which fresh_state clears",
            )
        return "ok", "a batch leaves no state behind for the next one"

    def _gradients(self) -> tuple[Any, ...]:
        modules, given = _by_name(_copy(self.awake, training=True)), list[str]()
        calls = _Run(_copy(self.awake, training=True), self.x_TB).joined()
        same_shape = [
            modules[name]
            for name in self.neurons
            if calls[name].inputs[0].shape == calls[name].outputs[0].shape
        ]
        for name, call in calls.items():
            module, error, failure = modules[name], None, ""
            try:
                if isinstance(module, LIF):
                    error = _unrolling_error(module, call)
                if error is None and module in same_shape:
                    error = _threshold_error(module, call, self.steps)
                elif call.outputs and name not in self.neurons:
                    with set_temporarily(same_shape, "forward", _sine):
                        error = _slope_error(module, call)
            except _Failed:  # it cannot run alone, and is checked as a part of other modules
                error = None if name in self.neurons else 0.0
            except RuntimeError as refusal:
                error, failure = math.inf, f"fails with {_Failed(refusal)}"
            if error is None and call.outputs:
                given += [] if _inside(name, given) else [name]
            elif error is not None and error > WRONG:
                return (
                    "fault",
                    f"its gradient {failure or f'is wrong (relative error {error:.1g})'}",
                    name,
                    "look for detach, .data, no_grad, writes in place and custom backwards",
                )
        if given:
            return (
                "note",
                "its gradient is not checked, because it has a step function of its own; the others"
                " are right",
                first_few(given, 3),
            )
        return "ok", "right: those of each module equal another derivative"

    def _activity(self) -> tuple[Any, ...]:
        network = _copy(self.network, training=True)
        calls = _Run(network, self.x_TB, has_graph=True).joined()
        modules, notes = (
            _by_name(self.network),
            [] if self.neurons else ["no module returns spikes"],
        )
        for name in self.neurons:
            fires_RN = calls[name].outputs[0].reshape(self.steps * self.samples, -1) != 0
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

    def _norms(self) -> tuple[Any, ...]:
        network, notes = _copy(self.network, training=True), list[str]()
        calls, trained = _Run(network, self.x_TB).joined(), _by_name(network)
        modules: dict[str, Any] = _by_name(self.network)
        for name in filter(calls.get, self.norms):
            norm, old, new = modules[name], modules[name].state_dict(), trained[name].state_dict()
            is_frozen = getattr(norm, "frozen", False) or not trained[name].training
            is_stuck = not is_frozen and torch.equal(old["running_var"], new["running_var"])
            away, at_first = (
                _distance(norm, calls[name].inputs[0], mean, var)
                for mean, var in ((old["running_mean"], old["running_var"]), (0, 1))
            )
            if is_stuck or away > FAR + at_first:
                return (
                    "fault",
                    f"its running statistics {'do not change' if is_stuck else 'are far away'}"
                    f" (distance {away:.2g} from the batch's)",
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

    def _time(self) -> tuple[Any, ...]:
        constant_TB = torch.stack([self.x_TB[0]] * self.steps)
        run = _Run(_copy(self.awake, training=True), constant_TB)
        modules, calls = _by_name(self.awake), run.joined()
        for name in self.neurons:
            if not _carries(modules[name], calls[name], self.steps):
                return (
                    "fault",
                    "for a constant input its spikes are the same at each step",
                    name,
                    "keep its membrane from step to step (decay above 0)",
                )
        if not _same(run.y_TB, run.y_TB[:1].expand_as(run.y_TB), SMALLEST):
            return "ok", "the answer changes with T; each layer of neurons carries state"
        if any(isinstance(module, IntegerNeuron) for module in modules.values()):
            return "note", "IntegerNeurons return numbers of spikes and keep no state"
        if not self.neurons:
            return "fault", "no module returns spikes, so T has no effect", _ROOT, "add neurons"
        return "note", "neurons carry state, but for a constant input no answer changes with T"


def _is_binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _blocks(module: nn.Module, call: _Call) -> bool:
    """Whether no gradient of a relevant size passes from the output of a neuron to its input."""
    alone = _Alone(module, call)
    y_TB = alone.outputs()[0]
    return _largest([_gradient(y_TB, alone.variables[0], _random(y_TB, 1))]) < NO_GRADIENT


def _carries(neuron: nn.Module, call: _Call, steps: int) -> bool:
    """Whether the last spikes of a neuron depend on the currents of the steps before."""
    alone = _Alone(neuron, call)
    x_TN = alone.variables[0].data.view(steps, -1)
    x_TN[:-1], x_TN[-1] = -LARGEST_CURRENT, FAR_CURRENT
    after_low = alone.outputs()[0]
    x_TN[:-1] = LARGEST_CURRENT
    after_high = alone.outputs()[0]
    return not torch.equal(*(y.reshape(steps, -1)[-1] for y in (after_low, after_high)))


def _distance(norm: Any, x: Tensor, other_mean_C: Any, other_var_C: Any) -> float:
    """The distance of a mean and a variance from those of the input `x` of a norm.

    It is the larger of two numbers: the difference of the means in standard deviations of the
    batch, and the ratio of the standard deviations minus 1. The median over channels is returned.
    """
    x_NC = x.flatten(0, 1) if isinstance(norm, BatchNorm) else x
    var_C, mean_C = torch.var_mean(x_NC, [0, *range(2, x_NC.dim())], correction=0)
    ratio_C = ((var_C + norm.eps) / (other_var_C + norm.eps)).log().abs() / 2
    difference_C = (mean_C - other_mean_C).abs() / (var_C + norm.eps).sqrt()
    return float(difference_C.maximum(ratio_C.exp() - 1).median())
