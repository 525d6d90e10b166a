"""Networks to and from NIR, a format that SpikingJelly, snnTorch, norse and chips read.

A NIR graph has layers as nodes. NIR's neurons are equations of continuous time, which every package
solves with Euler steps of DT seconds. (SpikingJelly's default and snnTorch's constant are this DT.)

    LIF    tau dv/dt = v_leak - v + r x     u[t] = (1 - DT/tau) v[t-1] + (r DT/tau) x[t]
    IF         dv/dt = r x                  u[t] = v[t-1] + r DT x[t]
           v = v_reset where u > v_threshold

So the parameters of a neuron without leak voltage and with reset to zero are

    tau = DT / (1 - decay);   r = tau / DT, or r = 1 with scale_input;   IF (decay 1): r = 1 / DT

NIR compares with ">", and so does snnTorch 1.0. SpikingJelly 2.0 compares with ">=". A neuron that
fires at u >= threshold has as its v_threshold the next smaller number of its precision. Then ">"
fires at the same u, and ">=" fires in addition only at this one number.

NIR sums the inputs of a node in no defined order, and the order changes the rounding. So an
addition is a node with two inputs: an average pool of one pixel. The dimensions of a flattening are
negative, because snnTorch counts the batch among them and SpikingJelly does not.

snnTorch reads an IF as a neuron with the beta 0.9, so networks with IF neurons run in SpikingJelly
alone (both checked on these versions, with nirtorch 2.6).

Source: Pedersen et al. 2024 (NIR, doi 10.1038/s41467-024-52259-9).
"""

# T time, B batch, C channels, H W pixels

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from graphlib import CycleError, TopologicalSorter
from typing import Any, NoReturn

import nir
import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pipeline.core.checks import require
from pipeline.models.parts import MeanPool, Pool
from pipeline.spiking.neuron import LIF, PLIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import fresh_state, set_temporarily, temporary_hooks
from pipeline.spiking.synapse import Conv2d, Linear, effective_weight

DT = 1e-4  # seconds of a time step

# Functions that keep the order of their input's elements, if they keep their number.
_RESHAPES = ("contiguous", "expand", "flatten", "reshape", "unflatten", "unsqueeze", "view_as")


@torch.no_grad()
def to_nir(network: nn.Module, shape: Sequence[int]) -> nir.NIRGraph:
    """The NIR graph of a network in evaluation mode. Batch norms are folded into synapses.

    Supported are LIF, IF and PLIF with reset to zero, convolutions, linear layers, average pools,
    flattening, and additions of images. `nir.write(file, graph)` writes a graph.

    Args:
        network: a network on `[T, B, *shape]`.
        shape: the shape of a sample at one time step, such as (C, H, W).

    Raises: ValueError that names a layer or an operation without an equal in NIR.
    """
    _refuse_neurons_and_pools(network)
    dtype = next(network.parameters()).dtype
    x_TB = torch.zeros(1, 1, *shape, dtype=dtype)
    trace = _Trace(network)
    trace.add_node("input", nir.Input({"input": np.array(shape)}), [], x_TB, shape)
    with set_temporarily(network.modules(), "training", False), fresh_state(network):
        network(x_TB)
        # The second step, so that the trace shows what else a network remembers.
        with temporary_hooks(trace.hooks()), trace:
            y_TB = network(x_TB)
    last = trace.node_of(y_TB, tuple(y_TB.shape[2:]), "the output")
    output = nir.Output({"output": np.array(y_TB.shape[2:])})
    return nir.NIRGraph({**trace.nodes, "output": output}, [*trace.edges, (last, "output")])


def _refuse_neurons_and_pools(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if isinstance(module, LIF) and type(module) not in (LIF, PLIF):
            _refuse(name, f"a {type(module).__name__} has no equal in NIR; train with LIF or IF")
        if isinstance(module, LIF) and module.reset != "zero":
            _refuse(name, f"NIR resets to a value; got {module.reset=}; train with reset='zero'")
        if isinstance(module, nn.MaxPool2d):
            _refuse(name, "NIR has no max pool; train with an average pool or a stride")


def _refuse(name: str, reason: str) -> NoReturn:
    raise ValueError(f"to_nir: {name or 'the network itself'}: {reason}")


class _Trace(TorchFunctionMode):
    """Records the layers and additions of one time step of one sample as nodes of a graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.modules = dict(network.named_modules())
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}  # of outputs, by node
        # The node that computes a tensor. The tensor is kept, so that no other gets its id.
        self.sources: dict[int, tuple[str, Tensor]] = {}
        self.is_in_layer = False

    def hooks(self) -> Any:
        for name, module in self.modules.items():
            node_of = next(
                (each for kind, each in _LAYERS.items() if isinstance(module, kind)), None
            )
            if node_of is not None:
                yield module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
                yield module.register_forward_hook(partial(self._leave, name, node_of))

    def _enter(self, name: str, _: nn.Module, __: Any, scales: Mapping[str, float]) -> None:
        self.is_in_layer = True
        if any(scale != 1 for scale in scales.values()):
            _refuse(name, f"NIR's neurons have no such factors; got {dict(scales)}")

    def _leave(
        self, name: str, node_of: Callable[..., Any], module: nn.Module, inputs: Any, y: Tensor
    ) -> None:
        leading = 1 if isinstance(module, _FOLDED) else 2
        source = self.node_of(inputs[0], inputs[0].shape[leading:], name)
        if isinstance(module, BatchNorm):
            is_read = any(source == start for start, _ in self.edges)
            if is_read or not hasattr(self.nodes[source], "weight"):
                _refuse(name, "a batch norm must follow a synapse, as its only reader")
            _fold(module, self.nodes[source])
            # A later reader of the synapse without its norm is refused.
            self.sources = {key: each for key, each in self.sources.items() if each[0] != source}
            self.sources[id(y)] = source, y
        else:
            try:
                node = node_of(module, inputs[0])
            except ValueError as error:
                _refuse(name, str(error))
            self.add_node(name, node, [source], y, y.shape[leading:])
        self.is_in_layer = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if id(x) in self.sources]
        if inputs and isinstance(y, Tensor) and not self.is_in_layer:
            self._add_function(func.__name__, inputs, y, args[1:], kwargs)
        return y

    def _add_function(
        self, name: str, inputs: list[Tensor], y: Tensor, arguments: Any, kwargs: Any
    ) -> None:
        x = inputs[0]
        names = [self.sources[id(each)][0] for each in inputs]
        if name in _RESHAPES and y.numel() == x.numel():
            self.sources[id(y)] = names[0], y
        elif name == "mean" and x.dim() == 5 and arguments == ((3, 4),):
            shape = (x.shape[2], 1, 1)
            self.add_node(f"{names[0]}_mean", _average_pool(x.shape[3:]), names, y, shape)
        elif name == "add" and len(inputs) == 2 and x.shape == inputs[1].shape and not kwargs:
            if x.dim() != 5:
                _refuse(names[0], f"it must be an image to be added; got shape {tuple(x.shape)}")
            self.add_node(f"{names[0]}_add", _average_pool(1), names, y, x.shape[2:])
        else:
            _refuse(
                names[0],
                f"NIR has no equal of {name!r}, which reads its output; use networks without"
                " products of signals (attention) and factors of spikes (norm='sws')",
            )

    def add_node(
        self, name: str, node: Any, inputs: list[str], y: Tensor, shape: Sequence[int]
    ) -> None:
        """Add a node that computes `y`, in this shape without time and samples."""
        name = name.replace(".", "_") or "network"
        if name in self.nodes:
            _refuse(name, "a layer must run once in a time step")
        self.nodes[name] = node
        self.edges += [(each, name) for each in inputs]
        self.shapes[name] = tuple(shape)
        self.sources[id(y)] = name, y

    def node_of(self, x: Tensor, shape: Sequence[int], reader: str) -> str:
        """The node that computes `x` in this shape, which may be a flattening."""
        if id(x) not in self.sources:
            _refuse(reader, "its input must be computed in this time step, by layers that NIR has")
        source, _ = self.sources[id(x)]
        computed = self.shapes[source]
        if computed == tuple(shape):
            return source
        if len(shape) != 1:
            _refuse(reader, f"its input must not be reshaped; got {tuple(shape)} from {computed}")
        node = nir.Flatten({"input": np.array(computed)}, start_dim=-len(computed), end_dim=-1)
        self.add_node(f"{source}_flat", node, [source], x, shape)
        return f"{source}_flat"


# ----------------------------------------------------------------------------------- layer to node


def _neuron(lif: LIF, x_TB: Tensor) -> Any:
    learnt = lif.learnt_decay()
    decay = lif.decay if learnt is None else learnt.item()
    threshold = x_TB.new_tensor(lif.threshold).numpy()
    if lif.comparison == ">=":
        threshold = np.nextafter(threshold, np.zeros_like(threshold))
    full = partial(np.full, tuple(x_TB.shape[2:]))
    common: Any = {"v_threshold": full(float(threshold)), "v_reset": full(0.0)}
    if decay == 1:
        return nir.IF(r=full(1 / DT), **common)
    tau = DT / (1 - decay)
    r = 1.0 if lif.scale_input else tau / DT
    return nir.LIF(tau=full(tau), r=full(r), v_leak=full(0.0), **common)


def _synapse(synapse: Any, x_TB: Tensor) -> Any:
    weight = effective_weight(synapse).numpy()
    bias = np.zeros(len(weight), weight.dtype) if synapse.bias is None else synapse.bias.numpy()
    if isinstance(synapse, nn.Linear):
        return nir.Affine(weight=weight, bias=bias)
    return nir.Conv2d(
        input_shape=(x_TB.shape[3], x_TB.shape[4]),
        weight=weight,
        stride=synapse.stride,
        padding=synapse.padding,
        dilation=synapse.dilation,
        groups=synapse.groups,
        bias=bias,
    )


def _fold(norm: BatchNorm, node: Any) -> None:
    """Multiply the weights of a synapse's node, and add to its bias, as batch norm does."""
    scale_C = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias_C = (torch.from_numpy(node.bias) - norm.running_mean.double()) * scale_C + norm.bias
    weight = torch.from_numpy(node.weight)
    scaled = weight * scale_C.view(-1, *[1] * (weight.dim() - 1))
    node.weight, node.bias = scaled.to(weight.dtype).numpy(), bias_C.to(weight.dtype).numpy()


def _pool(pool: Any, x_NCHW: Tensor) -> Any:
    pixels = np.array(x_NCHW.shape[2:])
    if isinstance(pool, MeanPool):
        return _average_pool(pool.size)
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        squares = np.array(_pair(pool.output_size))
        require(
            not (pixels % squares).any(),
            f"all its squares must have one size; got {squares} squares of {pixels} pixels",
        )
        return _average_pool(pixels // squares)
    node = _average_pool(pool.kernel_size, pool.stride, pool.padding)
    is_cut = (pixels + 2 * node.padding - node.kernel_size) % node.stride
    require(
        pool.divisor_override is None
        and (pool.count_include_pad or not node.padding.any())
        and not (pool.ceil_mode and is_cut.any()),
        f"NIR's pools divide by the size of a square, which is inside the padded image; got {pool}",
    )
    return node


def _average_pool(kernel: Any, stride: Any = None, padding: Any = 0) -> nir.AvgPool2d:
    sizes = (kernel, kernel if stride is None else stride, padding)
    return nir.AvgPool2d(*(np.array(np.broadcast_to(size, 2)) for size in sizes))


_FOLDED = (MeanPool, nn.AvgPool2d, nn.AdaptiveAvgPool2d)  # their inputs are [N, C, H, W]
_LAYERS: dict[Any, Callable[..., Any]] = {
    LIF: _neuron,
    (Conv2d, Linear): _synapse,
    BatchNorm: _fold,
    _FOLDED: _pool,
}


# -------------------------------------------------------------------------------------------- back


class NIRNetwork(nn.Module):
    """The network of a NIR graph, `[T, B, ...]` to `[T, B, ...]`. `layers` are its nodes.

    Args:
        layers: the layers by node, each after those that it reads.
        inputs: the nodes that each node reads. Their outputs are summed.
        last: the node whose output is that of the network.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], inputs: Mapping[str, Sequence[str]], last: str
    ) -> None:
        super().__init__()
        self.layers, self.inputs, self.last = nn.ModuleDict(layers), inputs, last

    def forward(self, x_TB: Tensor) -> Tensor:
        outputs: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            read = [outputs[each] for each in self.inputs[name]] or [x_TB]
            outputs[name] = layer(reduce(torch.add, read))
        return outputs[self.last]


def from_nir(graph: nir.NIRGraph) -> NIRNetwork:
    """The network of a NIR graph, in evaluation mode. `nir.read(file)` reads a graph.

    Supported are the layers that `to_nir` writes and linear layers without bias. Neurons of a node
    must be equal.

    Raises: ValueError that names a node without an equal here, a graph with a loop, or a graph
    without exactly one input and one output.
    """
    names = {name: name.replace(".", "_") for name in graph.nodes}
    inputs: dict[str, list[str]] = {name: [] for name in names.values()}
    for source, reader in graph.edges:
        inputs[names[reader]].append(names[source])
    ends = len(graph.inputs), len(graph.outputs)
    require(ends == (1, 1), f"from_nir: the graph must have one input and one output; got {ends}")
    nodes = {names[name]: node for name, node in graph.nodes.items()}
    try:
        order = tuple(TopologicalSorter(inputs).static_order())
    except CycleError as error:
        raise ValueError(f"from_nir: the graph must have no loop; got {error.args[1]}") from error
    layers = {}
    for name in order:
        try:
            layers[name] = _layer(nodes[name])
        except ValueError as error:
            raise ValueError(f"from_nir: node {name!r}: {error}") from None
    return NIRNetwork(layers, inputs, *(names[name] for name in graph.outputs)).eval()


def _layer(node: Any) -> nn.Module:
    kind = type(node).__name__
    if kind in ("Input", "Output"):
        return nn.Identity()
    if kind in ("Affine", "Linear", "Conv2d"):
        return _synapse_of(node)
    if kind in ("LIF", "IF"):
        return _neuron_of(node)
    if kind == "AvgPool2d":
        return Pool(nn.AvgPool2d(*map(_pair, (node.kernel_size, node.stride, node.padding))))
    require(kind == "Flatten", f"must be a layer that to_nir writes; got {kind}")
    start, end = (int(each) for each in (node.start_dim, node.end_dim))
    return nn.Flatten(start + 2 if start >= 0 else start, end + 2 if end >= 0 else end)


def _pair(size: Any) -> Any:
    return tuple(int(each) for each in np.broadcast_to(size, 2))


def _synapse_of(node: Any) -> nn.Module:
    weight, bias = torch.from_numpy(node.weight), getattr(node, "bias", None)
    outputs, inputs = weight.shape[:2]
    if weight.dim() == 2:
        synapse: Any = Linear(inputs, outputs, bias is not None)
    else:
        geometry: Any = (*map(_pair, (node.stride, node.padding, node.dilation)), int(node.groups))
        size: Any = tuple(weight.shape[2:])
        synapse = Conv2d(inputs * int(node.groups), outputs, size, *geometry)
    synapse.weight.data = weight.clone()
    if bias is not None:
        synapse.bias.data = torch.from_numpy(bias).clone()
    return synapse


def _neuron_of(node: Any) -> LIF:
    values = {}
    for name in ("v_threshold", "v_reset", "r", "tau", "v_leak"):
        if hasattr(node, name):
            different = np.unique(getattr(node, name))
            require(len(different) == 1, f"all neurons must have one {name}; got {different}")
            values[name] = float(different[0])
    for name in ("v_reset", "v_leak"):
        value = values.get(name, 0.0)
        require(value == 0, f"{name} must be 0, the membrane of a neuron at rest; got {value:g}")
    build = partial(LIF, threshold=values["v_threshold"], comparison=">", reset="zero")
    if "tau" not in values:
        require(math.isclose(values["r"], 1 / DT), f"r must be {1 / DT:g}; got {values['r']:g}")
        return build(1.0)
    decay = 1 - DT / values["tau"]
    is_scaled = math.isclose(values["r"], 1)
    require(
        is_scaled or math.isclose(values["r"], values["tau"] / DT),
        f"r must be 1 or tau / DT = {values['tau'] / DT:g}; got {values['r']:g}",
    )
    return build(decay, scale_input=is_scaled)
