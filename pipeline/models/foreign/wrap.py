"""`wrap`: a torch network with neurons of SpikingJelly, snnTorch or norse as a time-first network.

The wrapped network has a copy of the original with the same modules and names. The parameters and
buffers of the copy are those of the original. Three kinds of modules are replaced in the copy:

    neurons              by a `ForeignNeuron`, which has an equal LIF
    batch norm           by our `BatchNorm`
    SeqToANNContainer    by `Folded`, whose layers get the time axis if they need it

Linear layers and convolutions become our synapses if a rule requests it (`give_seams`).
"""

# T time, B batch, K classes

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pipeline.core.checks import is_count, refuse_unless_one_of, require
from pipeline.models.foreign.equal_lif import LearntDecay, of_norse, of_snntorch, of_spikingjelly
from pipeline.models.foreign.neuron import ForeignNeuron, Token
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.norm import BatchNorm, foreign_norms
from pipeline.spiking.state import copies_without_graph
from pipeline.spiking.synapse import Conv2d, Linear, apply_folded

Output = Literal["spikes", "membrane"] | int
Norm = Literal["as_is", "step"]

# How a module gets the time steps: one per call; all, [T, B, ...], with step_mode "m" or directly
# in a SeqToANNContainer, which becomes `Folded`; all as one batch, [T B, ...]; in an unknown way.
_Time = Literal["one", "all", "folded", "batch", "unknown"]

_SJ = "spikingjelly.activation_based."
_NEURONS = {
    **dict.fromkeys(
        (f"{_SJ}neuron.integrate_and_fire.IFNode", f"{_SJ}neuron.lif.LIFNode"), of_spikingjelly
    ),
    f"{_SJ}neuron.plif.ParametricLIFNode": of_spikingjelly,
    "snntorch._neurons.leaky.Leaky": of_snntorch,
    **dict.fromkeys(
        (
            "norse.torch.module.lif_box.LIFBoxCell",
            "norse.torch.module.lif.LIFCell",
            "norse.torch.module.iaf.IAFCell",
        ),
        of_norse,
    ),
}
# The beginnings of the names of classes without state and without an effect between time steps.
_STATELESS = (
    *(f"{_SJ}base.{kind}StepModule" for kind in ("", "Single", "Multi")),
    *(f"{_SJ}layer.bn.BatchNorm{dimensions}d" for dimensions in (1, 2, 3)),
    *(f"{_SJ}layer.{name}" for name in ("stateless_wrapper.", "misc.VotingLayer")),
    *(f"{_SJ}layer.attention.{kind}" for kind in ("SpikingSelf", "QK", "TokenQK", "ChannelQK")),
    *(f"{_SJ}{name}." for name in ("model", "surrogate")),
    *(f"{_SJ}layer.container.{kind}" for kind in ("MultiStep", "SeqToANN", "StepMode")),
    "norse.torch.module.sequential.SequentialState",
)
_DROPOUT = f"{_SJ}layer.dropout.Dropout"  # has one mask for all time steps, as ours
# By package: what can be wrapped. Another release may have its classes in other modules.
ACCEPTED = {
    "spikingjelly": "IFNode, LIFNode, ParametricLIFNode or a layer without state, of release 2.0",
    "snntorch": "Leaky, of release 1.0",
    "norse": "LIFBoxCell, IAFCell, LIFCell with dt tau_syn_inv = 1, or SequentialState, of release"
    " 1.1",
}


def wrap(network: nn.Module, output: Output = "spikes", norm: Norm = "as_is") -> "Wrapped":
    """A network of another package as a network `[T, B, ...]` to `[T, B, K]`, for the rules.

    A SpikingJelly network with step_mode "m" is called once for all time steps, any other network
    once per time step. Inside `fresh_state` the neurons keep their own state; a state that the
    network takes as an argument is None at first, and then the one that it returned last.

    The original is not changed. Both share their parameters, so training the wrapped network trains
    the original. `unwrap` gives it back. An optimizer needs the parameters of the wrapped network,
    where a parameter without dimensions is another object.

    Args:
        output: what the wrapped network returns. "spikes": the output of the network, or the first
            element of a tuple. "membrane": the membrane of the neuron that runs last, as its
            package returns it. A number: this element of the tuple.
        norm: the statistics of batch norm in a network that is called once. "as_is": of all time
            steps, as in the original; rules that pass slices of time refuse it. "step": of each
            time step, which changes the network. A network that is called once per time step has
            statistics of each step anyway.

    Raises: ValueError that names the module for a module that cannot be mapped, a neuron without an
    equal LIF, a neuron that takes the time steps for samples, a batch norm that cannot have
    statistics of each step, or a module with hooks that is replaced; for a network without neurons.
    """
    require(
        isinstance(network, nn.Module),
        f"wrap: network must be a torch.nn.Module; got {type(network).__name__}",
    )
    require(
        output in ("spikes", "membrane") or is_count(output, minimum=0),
        f"wrap: output must be 'spikes', 'membrane' or an index >= 0; got output={output!r}",
    )
    refuse_unless_one_of("wrap", ("as_is", "step"), norm=norm)
    return Wrapped(network, output, norm)


def unwrap(wrapped: "Wrapped") -> nn.Module:
    """The original network of `wrap`, with the trained parameters and buffers.

    Raises: ValueError for another module, or for a copy of a wrapped network.
    """
    original = getattr(wrapped, "original", None)
    require(
        isinstance(original, _Original) and original.network is not None,
        f"unwrap: needs the network that wrap returned; got {type(wrapped).__name__}, which is"
        " another network or a copy",
    )
    network: Any = original.network  # type: ignore[union-attr]
    for tensor, owner, name in original.tensors:  # type: ignore[union-attr]
        # `Module.to` and DeepSpeed give buffers and reshaped parameters other memory.
        tensor.data = getattr(owner, name).data.view_as(tensor)
    network.to(next(wrapped.parameters(), torch.empty(0)).device)  # what only the original has
    copies = dict(wrapped.network.named_modules())
    for name, module in network.named_modules():
        if name in copies:
            module.training = copies[name].training
    return network


class Folded(nn.Sequential):
    """The layers of a SeqToANNContainer: each gets `[T B, ...]`, or `[T, B, ...]` if it is ours."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            has_time = isinstance(layer, (Linear, Conv2d, BatchNorm, Dropout, Folded))
            input = layer(input) if has_time else apply_folded(layer, input)
        return input


class Conv1d(Conv2d):
    """A convolution with the weight `[O, I, K]` on images of height 1, `[T, B, C, 1, L]`."""

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        return super().forward(input, self.weight.unsqueeze(2) if weight is None else weight)


class _Original(NamedTuple):
    """The original network, and its tensors with their places (module and name) in the copy.

    A copy of the wrapped network has no original.
    """

    network: nn.Module | None = None
    tensors: Sequence[tuple[Tensor, nn.Module, str]] = ()

    def __deepcopy__(self, _: Any) -> "_Original":
        return _Original()


class Wrapped(nn.Module):
    """The network of `wrap`, `[T, B, ...]` to `[T, B, K]`.

    Raises: ValueError in `forward` if a neuron runs more than once in a call, if the network
    changes a state, or if its output does not have the shape `[T, B, K]`.
    """

    def __init__(self, network: nn.Module, output: Output, norm: Norm) -> None:
        super().__init__()
        self.output, self.norm = output, norm
        self.steps = 1  # of the call in progress
        self.ran: list[ForeignNeuron] = []
        self.neurons: dict[ForeignNeuron, bool] = {}  # and whether a container loops over them
        self.states: tuple[Any, ...] = ()
        self.passes_states = False  # whether the network gets the states that it returned last
        # `deepcopy` must not copy parameters and buffers.
        memo: dict[int, Any] = copies_without_graph(network) | {
            id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())
        }
        self.is_multi_step = any(
            _class_name(module).startswith(_SJ)
            and (_time_inside(module) or getattr(module, "step_mode", "s") == "m")
            for module in network.modules()
        )
        places = list(_places(network, "one" if not self.is_multi_step else "unknown"))
        for place in places:
            if _class_name(place[1]) in _NEURONS and id(place[1]) not in memo:
                self._replace_neuron(*place, memo)
        require(
            self.neurons,
            f"wrap: the network must have neurons of {', '.join(ACCEPTED)}; got"
            f" {type(network).__name__}",
        )
        self._replace_norms(network, places, memo)
        self._replace_dropout(places, memo)
        for name, module, time in reversed(places):  # inner containers first
            is_inner = type(module) is nn.Sequential and time == "folded"
            if _time_inside(module) == "folded" or is_inner:
                layers = {key: copy.deepcopy(each, memo) for key, each in module._modules.items()}
                memo[id(module)] = Folded(OrderedDict(layers))
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            require(
                id(module) not in memo or not any(hooks),
                f"wrap: {_describe(name, module)}: is replaced and must have no hooks; remove them,"
                " and register them on the wrapped network",
            )
        self.network = copy.deepcopy(network, memo)
        self.layers: list[Any] = [
            (memo[id(module)], name, time)
            for name, module, time in places
            if _can_have_seams(module, time)
        ]
        self.original = _Original(network, self._shared_tensors(places, memo))
        _, *arguments = inspect.signature(network.forward).parameters.values()
        self.state_arguments = sum(
            each.kind is each.POSITIONAL_OR_KEYWORD
            and (each.default is each.empty or (self.passes_states and each.default is None))
            for each in arguments
        )

    def _shared_tensors(
        self, places: list[tuple[str, Any, _Time]], memo: dict[int, Any]
    ) -> list[tuple[Tensor, nn.Module, str]]:
        """The original network's tensors, with their places (module and name) in the copy."""
        shared = [
            (tensor, module, name)
            for module in self.network.modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and id(tensor) in memo
        ]
        reshaped = [
            (next(module.parameters()), memo[id(module)].lif, "parameter")
            for _, module, _ in places
            if isinstance(getattr(memo[id(module)], "lif", None), LearntDecay)
        ]
        return shared + reshaped

    # -------------------------------------------------------------------------------------- forward

    def forward(self, x_TB: Tensor) -> Tensor:
        if self.is_multi_step:
            y_TBK = self._run(x_TB, steps=len(x_TB))
        else:
            y_TBK = torch.stack([self._run(x_B, steps=1) for x_B in x_TB.unbind(0)])
        require(
            y_TBK.dim() >= 3 and y_TBK.shape[:2] == x_TB.shape[:2],
            "wrap: the network must return one output per time step and sample,"
            f" [{x_TB.shape[0]}, {x_TB.shape[1]}, K]; got shape {tuple(y_TBK.shape)}; take a mean"
            " over time out of the network's forward",
        )
        return y_TBK

    def _run(self, x: Tensor, *, steps: int) -> Tensor:
        """The output of one call of the network."""
        self.steps = steps
        for neuron, is_in_loop in self.neurons.items():
            neuron.runs_left = steps if is_in_loop else 1
        is_first = all(neuron.lif.state.read("v") is None for neuron in self.neurons)
        if is_first or not self.passes_states:
            self.states = (None,) * self.state_arguments
        try:
            return self._output_of(self.network(x, *self.states))
        finally:
            self.ran.clear()
            for neuron in self.neurons:
                neuron.forget()

    def _output_of(self, result: Any) -> Tensor:
        kind = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        if self.passes_states and self.state_arguments:
            require(
                isinstance(result, tuple) and len(result) == 1 + self.state_arguments,
                "wrap: the network must return its output and then a state for each of its"
                f" {self.state_arguments} arguments after the input; got {kind}",
            )
            # The token of a neuron takes the place of its recorded membrane.
            tokens = {id(each.token.v): each.token for each in self.neurons if each.recorded}
            elements = tree_map(lambda leaf: tokens.get(id(leaf), leaf), result)
            # The output comes first or, as in snnTorch's documentation, last.
            states = elements[:-1] if isinstance(elements[0], Token) else elements[1:]
            require(
                not any(isinstance(leaf, Tensor) for leaf in tree_leaves(states))
                or all(neuron.none_continues for neuron in self.neurons),
                "wrap: the network must pass on only states of neurons, because rules detach only"
                " these; got a tensor",
            )
            # snnTorch's networks may have spikes among their arguments. What uses them is refused.
            self.states = tree_map(
                lambda leaf: Token("a neuron") if isinstance(leaf, Tensor) else leaf, states
            )
        index: Any = 0 if self.output == "spikes" else self.output
        if self.output == "membrane":
            require(self.ran, "wrap: the network must run a neuron for output='membrane'; got none")
            recorded = self.ran[-1].recorded
            result = torch.stack(recorded) if self.is_multi_step else recorded[-1]
        elif isinstance(result, tuple):
            result = result[index] if index < len(result) else None
        elif self.output != "spikes":
            result = None
        require(
            isinstance(result, Tensor),
            f"wrap: the network must return a tensor as output={self.output!r}; got {kind}",
        )
        return result

    def extra_repr(self) -> str:
        calls = "once" if self.is_multi_step else "once per time step"
        return f"output={self.output!r}, norm={self.norm!r}, the network is called {calls}"

    # --------------------------------------------------------------------------------- replacements

    def _replace_neuron(self, name: str, module: Any, time: _Time, memo: dict[int, Any]) -> None:
        """Put the neuron for `module` into `memo`.

        Raises: ValueError that names it, for a neuron without an equal LIF.
        """
        try:
            equal = _NEURONS[_class_name(module)](module)
            require(
                time in ("one", "all"),
                "a neuron that gets all time steps in one call must have step_mode 'm', or be in a"
                " MultiStepContainer, because otherwise it takes the time steps for samples",
            )
        except ValueError as error:
            raise ValueError(f"wrap: {_describe(name, module)}: {error}") from None
        neuron = ForeignNeuron(
            name,
            equal,
            self.ran,
            has_time=time == "all",
            none_continues=not _class_name(module).startswith("norse."),
            records=self.output != "spikes",
        )
        # norse's cells, and snnTorch's neurons without a hidden state
        self.passes_states |= not (neuron.none_continues and getattr(module, "init_hidden", True))
        memo[id(module)] = neuron.train(module.training)
        self.neurons[neuron] = self.is_multi_step and time == "one"

    def _replace_norms(self, network: nn.Module, places: Sequence[Any], memo: Any) -> None:
        """Put our batch norms into `memo`.

        Raises: ValueError for a batch norm that would remain over time under norm="step".
        """
        mixing = {id(module) for module in foreign_norms(network).values()}
        for name, module, time in places:
            if id(module) not in mixing:
                continue
            is_plain = type(module).__name__ in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d") and (
                module.affine and module.momentum and module.track_running_stats
            )
            if time in ("batch", "unknown") or not is_plain:
                require(
                    self.norm == "as_is",
                    f"wrap: norm='step' needs batch norms of torch or SpikingJelly with a time"
                    f" axis; got {_describe(name, module)}; use SpikingJelly's layer.BatchNorm2d"
                    " with step_mode 'm', or norm='as_is'",
                )
                continue
            over = "time" if time != "one" and self.norm == "as_is" else "step"
            norm = BatchNorm(
                module.num_features, eps=module.eps, momentum=module.momentum, over=over
            )
            norm.weight, norm.bias = module.weight, module.bias
            norm.running_mean, norm.running_var = module.running_mean, module.running_var
            norm.register_buffer("num_batches_tracked", module.num_batches_tracked)
            memo[id(module)] = norm.train(module.training)
            if time == "one":
                _add_axis(norm, 0)
            norm.register_forward_pre_hook(_count_batches)

    def _replace_dropout(self, places: Sequence[Any], memo: dict[int, Any]) -> None:
        """Put our dropout into `memo`, in place of SpikingJelly's or of one that is ours already.

        Raises: ValueError that names a dropout which takes the time steps for samples.
        """
        for name, module, time in places:
            is_ours = isinstance(module, Dropout)
            if not is_ours and _class_name(module) != _DROPOUT:
                continue
            require(
                time in ("one", "all", "folded") or (is_ours and time == "unknown"),
                f"wrap: {_describe(name, module)}: must have step_mode 'm', to get all time steps",
            )
            dropout = copy.deepcopy(module) if is_ours else Dropout(module.p)
            memo[id(module)] = dropout.train(module.training)
            if time == "one":
                _add_axis(memo[id(module)], 0)

    def give_seams(self) -> None:
        """Make linear layers and convolutions our synapses, with the same parameters and names.

        `synapse.request_seams` calls it for a rule. A layer stays as it is if its input has no time
        axis, or if its padding is not zero or is text.
        """
        while self.layers:
            layer, name, time = self.layers.pop()
            # The class is changed, not the object, so that every reference to the layer holds.
            kind = type(layer).__name__
            layer.__class__ = {"Linear": Linear, "Conv1d": Conv1d, "Conv2d": Conv2d}[kind]
            layer._init_synapse("plain")
            if kind == "Conv1d":
                for attribute in ("kernel_size", "stride", "dilation"):
                    setattr(layer, attribute, (1, *getattr(layer, attribute)))
                layer.padding = (0, *layer.padding)
                _add_axis(layer, -2)
            if time == "one":
                _add_axis(layer, 0)
            else:
                layer.register_forward_pre_hook(partial(_check_time_axis, self, name))


def _places(module: Any, time: _Time, name: str = "") -> Iterator[tuple[str, Any, _Time]]:
    """Name, module and time of `module` and of every module inside it that is not in a neuron.

    `time` is that of the module around it.

    Raises: ValueError that names a module of another package that cannot be in a wrapped network.
    """
    foreign, is_neuron = _class_name(module), _class_name(module) in _NEURONS
    is_stateful = any(kind.__name__ == "MemoryModule" for kind in type(module).__mro__)
    require(
        not foreign
        or is_neuron
        or foreign == _DROPOUT
        or (foreign.startswith(_STATELESS) and not is_stateful),
        f"wrap: {_describe(name, module)}: this class, {foreign}, cannot be mapped; replace it by"
        f" {ACCEPTED.get(foreign.partition('.')[0])}",
    )
    has_step_mode_m = getattr(module, "step_mode", "s") == "m"
    yield name, module, "all" if time == "unknown" and has_step_mode_m else time
    if time == "folded" and type(module) is not nn.Sequential:
        time = "batch"
    time = _time_inside(module) or time
    for child_name, child in () if is_neuron else module.named_children():
        yield from _places(child, time, f"{name}.{child_name}" if name else child_name)


def _class_name(module: nn.Module) -> str:
    """The name of the first class of `module` that is from another package; "": it has none.

    A user's subclass, which may compute something else, has the name with a "+".
    """
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
    foreign = next((name for name in names if name.partition(".")[0] in ACCEPTED), "")
    return foreign + "+" if foreign and foreign != names[0] else foreign


def _time_inside(module: Any) -> _Time | None:
    """How a container of SpikingJelly passes on the time steps; None: `module` is none."""
    kind = _class_name(module).removeprefix(f"{_SJ}layer.container.")
    if kind == "StepModeContainer" and module.step_mode == "m":
        return "one" if module.stateful else "folded"
    times: dict[str, _Time] = {"MultiStepContainer": "one", "SeqToANNContainer": "folded"}
    return times.get(kind)


def _describe(name: str, module: nn.Module) -> str:
    package = type(module).__module__.partition(".")[0]
    return f"{name or 'the network itself'} ({package}.{type(module).__name__})"


def _can_have_seams(module: Any, time: _Time) -> bool:
    """Whether `module` is a layer that can be our synapse, and its input has a time axis."""
    if type(module).__module__.partition(".")[0] not in ("torch", "spikingjelly"):
        return False
    if type(module).__name__ in ("Conv1d", "Conv2d"):
        is_plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return is_plain and time not in ("batch", "unknown")
    return type(module).__name__ == "Linear" and time != "batch"


def _add_axis(module: nn.Module, axis: int) -> None:
    """Let `module` take and return tensors without this axis, such as time, which it needs."""
    module.register_forward_pre_hook(lambda _, inputs: inputs[0].unsqueeze(axis))
    # First, because a hook of the user gets the output without the axis.
    module.register_forward_hook(lambda _, __, y: y.squeeze(axis), prepend=True)


def _count_batches(norm: Any, inputs: tuple[Tensor, ...]) -> None:
    # torch's batch norm counts the updates of its statistics.
    if norm.uses_batch_statistics:
        norm.num_batches_tracked += len(inputs[0]) if norm.over == "step" else 1


def _check_time_axis(wrapped: Wrapped, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    require(
        len(inputs[0]) == wrapped.steps,
        f"wrap: the input of {name} must be time first, [T, B, ...], because the rule needs each"
        f" step; got shape {tuple(inputs[0].shape)} at T={wrapped.steps}",
    )
