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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from graphlib import CycleError, TopologicalSorter
from typing import Any

import nir
import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

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
    for name, module in network.named_modules():
        _refuse(name, module)
    x_TB = torch.zeros(1, 1, *shape, dtype=next(network.parameters()).dtype)
    trace = _Trace()
    trace.add_node("input", nir.Input({"input": np.array(shape)}), [], x_TB, shape)
    with set_temporarily(network.modules(), "training", False), fresh_state(network):
        network(x_TB)
        # The second step, so that the trace shows what else a network remembers.
        with temporary_hooks(trace.hooks(network)), trace:
            y_TB = network(x_TB)
    shape = y_TB.shape[2:]
    last = trace.node_of(y_TB, shape, "the output")
    trace.add_node("output", nir.Output({"output": np.array(shape)}), [last], y_TB, shape)
    return nir.NIRGraph(trace.nodes, trace.edges)


def _refuse(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    require(
        not isinstance(module, LIF) or (type(module) in (LIF, PLIF) and module.reset == "zero"),
        f"to_nir: {name}: neurons of NIR are LIF or IF with reset to a value; got {kind} with reset"
        f" {getattr(module, 'reset', None)!r}; train with LIF(reset='zero')",
    )
    require(
        not isinstance(module, nn.MaxPool2d),
        f"to_nir: {name}: NIR has no max pool; train with an average pool or a stride",
    )


class _Trace(TorchFunctionMode):
    """Records the layers and additions of one time step of one sample as nodes of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        # By id of a tensor: the node that computes it, the shape of the node's output, and the
        # tensor, so that no other tensor gets its id.
        self.computed: dict[int, tuple[str, tuple[int, ...], Tensor]] = {}
        self.is_in_layer = False

    def hooks(self, network: nn.Module) -> Iterator[RemovableHandle]:
        for name, module in network.named_modules():
            if isinstance(module, tuple(_NODES)):
                yield module.register_forward_pre_hook(self._enter)
                yield module.register_forward_hook(partial(self._leave, name), with_kwargs=True)

    def _enter(self, *_: Any) -> None:
        self.is_in_layer = True

    def _leave(
        self, name: str, module: nn.Module, inputs: Any, factors: Mapping[str, float], y: Tensor
    ) -> None:
        require(
            all(factor == 1 for factor in factors.values()),
            f"to_nir: {name}: neurons of NIR have no factors; got {dict(factors)}; train with batch"
            " norm",
        )
        (x,) = inputs
        leading = 1 if x.dim() == 4 else 2  # a pool has one dimension for time and samples
        source = self.node_of(x, x.shape[leading:], name)
        if isinstance(module, BatchNorm):
            node = self.nodes[source]
            require(
                hasattr(node, "weight") and all(source != read for read, _ in self.edges),
                f"to_nir: {name}: a batch norm must follow a synapse, as its only reader",
            )
            _fold(module, node)
            # A later reader of the synapse without its norm is refused.
            others = {key: each for key, each in self.computed.items() if each[0] != source}
            self.computed = {**others, id(y): (source, tuple(y.shape[leading:]), y)}
        else:
            build = next(each for kind, each in _NODES.items() if isinstance(module, kind))
            self.add_node(name, build(module, x), [source], y, y.shape[leading:])
        self.is_in_layer = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if id(x) in self.computed]
        if inputs and isinstance(y, Tensor) and not self.is_in_layer:
            self._add_function(func.__name__, inputs, y, (*args[1:], *(kwargs or {}).values()))
        return y

    def _add_function(self, name: str, inputs: list[Tensor], y: Tensor, others: Any) -> None:
        x, sources = inputs[0], [self.computed[id(each)][0] for each in inputs]
        label, is_image = f"{sources[0]}_{name}", x.dim() == 5
        if name in _RESHAPES and y.numel() == x.numel():
            self.computed[id(y)] = (*self.computed[id(x)][:2], y)
        elif name == "mean" and is_image and others == ((3, 4),):
            shape = (x.shape[2], 1, 1)
            self.add_node(label, _average_pool(x.shape[3:]), sources, y, shape)
        else:
            require(
                name == "add" and is_image and len(inputs) == 2 and len(others) == 1,
                f"to_nir: {sources[0]}: NIR has no equal of {name!r}, which reads its output; use"
                " networks that add images, without products of signals as in attention",
            )
            self.add_node(label, _average_pool(1), sources, y, y.shape[2:])

    def add_node(
        self, name: str, node: Any, sources: list[str], y: Tensor, shape: Sequence[int]
    ) -> None:
        """Add a node that computes `y`, in this shape without time and samples."""
        name = name.replace(".", "_")
        if name in self.nodes:
            is_neuron = isinstance(node, (nir.LIF, nir.IF))
            require(not is_neuron, f"to_nir: {name}: a neuron must run once in a time step")
            name = f"{name}_{len(self.nodes)}"
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]
        self.computed[id(y)] = name, tuple(shape), y

    def node_of(self, x: Tensor, shape: Sequence[int], reader: str) -> str:
        """The node that computes `x` in this shape, which may be a flattening."""
        require(
            id(x) in self.computed,
            f"to_nir: {reader}: its input must be computed in this step, by layers that NIR has",
        )
        source, computed, _ = self.computed[id(x)]
        if computed == tuple(shape):
            return source
        require(
            len(shape) == 1,
            f"to_nir: {reader}: its input must not be reshaped from {computed} to {tuple(shape)}",
        )
        flatten = nir.Flatten({"input": np.array(computed)}, start_dim=-len(computed), end_dim=-1)
        self.add_node(f"{source}_flat", flatten, [source], x, shape)
        return f"{source}_flat"


# ----------------------------------------------------------------------------------- layer to node


def _neuron(lif: LIF, x_TB: Tensor) -> nir.NIRNode:
    learnt = lif.learnt_decay()
    leak = 1 - (lif.decay if learnt is None else learnt.item())
    threshold = x_TB.new_tensor(lif.threshold).numpy()
    if lif.comparison == ">=":
        threshold = np.nextafter(threshold, np.zeros_like(threshold))
    values = {"v_threshold": float(threshold), "v_reset": 0.0, "r": 1 / DT}
    if leak:
        values |= {"tau": DT / leak, "v_leak": 0.0, "r": 1.0 if lif.scale_input else 1 / leak}
    arrays: Any = {key: np.full(tuple(x_TB.shape[2:]), each) for key, each in values.items()}
    return nir.LIF(**arrays) if leak else nir.IF(**arrays)


def _synapse(synapse: Any, x_TB: Tensor) -> nir.NIRNode:
    weight = effective_weight(synapse).numpy()
    bias = np.zeros(len(weight), weight.dtype) if synapse.bias is None else synapse.bias.numpy()
    if isinstance(synapse, nn.Linear):
        return nir.Affine(weight, bias)
    geometry = (synapse.stride, synapse.padding, synapse.dilation, synapse.groups)
    return nir.Conv2d((x_TB.shape[3], x_TB.shape[4]), weight, *geometry, bias)


def _fold(norm: BatchNorm, node: Any) -> None:
    """Multiply the weights of a synapse's node, and add to its bias, as batch norm does."""
    scale_C = (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).numpy()
    bias_C = (node.bias - norm.running_mean.numpy()) * scale_C + norm.bias.numpy()
    weight = node.weight * scale_C.reshape(-1, *[1] * (node.weight.ndim - 1))
    node.weight, node.bias = (each.astype(node.weight.dtype) for each in (weight, bias_C))


def _pool(pool: Any, x_NCHW: Tensor) -> nir.NIRNode:
    if isinstance(pool, MeanPool):
        return _average_pool(pool.size)
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        pixels, squares = np.array(x_NCHW.shape[2:]), np.array(_pair(pool.output_size))
        require(
            not (pixels % squares).any(),
            f"to_nir: {pool}: all its squares must have one size; got {pixels} pixels",
        )
        return _average_pool(pixels // squares)
    require(
        pool.divisor_override is None and (pool.count_include_pad or pool.padding in (0, (0, 0))),
        f"to_nir: {pool}: a pool of NIR divides by the size of its square, with the padding",
    )
    return _average_pool(pool.kernel_size, pool.stride, pool.padding)


def _average_pool(kernel: Any, stride: Any = None, padding: Any = 0) -> nir.AvgPool2d:
    stride = kernel if stride is None else stride
    return nir.AvgPool2d(*(np.array(_pair(size)) for size in (kernel, stride, padding)))


_NODES: dict[Any, Callable[..., nir.NIRNode | None]] = {
    LIF: _neuron,
    Conv2d: _synapse,
    Linear: _synapse,
    BatchNorm: _fold,
    MeanPool: _pool,
    nn.AvgPool2d: _pool,
    nn.AdaptiveAvgPool2d: _pool,
}


# -------------------------------------------------------------------------------------------- back


class NIRNetwork(nn.Module):
    """The network of a NIR graph, `[T, B, ...]` to `[T, B, ...]`. `layers` are its nodes.

    Args:
        layers: the layers by node, each after those that it reads.
        sources: the nodes that each node reads. Their outputs are summed.
        last: the node whose output is that of the network.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], sources: Mapping[str, Sequence[str]], last: str
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({key.replace(".", "_"): each for key, each in layers.items()})
        self.order, self.sources, self.last = tuple(layers), sources, last

    def forward(self, x_TB: Tensor) -> Tensor:
        outputs: dict[str, Tensor] = {}
        for name, layer in zip(self.order, self.layers.values(), strict=True):
            read = [outputs[source] for source in self.sources[name]] or [x_TB]
            outputs[name] = layer(reduce(torch.add, read))
        return outputs[self.last]


def from_nir(graph: nir.NIRGraph) -> NIRNetwork:
    """The network of a NIR graph, in evaluation mode. `nir.read(file)` reads a graph.

    Supported are the layers that `to_nir` writes and linear layers without bias. All neurons of a
    node must be equal.

    Raises: ValueError that names a node without an equal here, a graph with a loop, or a graph
    without exactly one input and one output.
    """
    ends = len(graph.inputs), len(graph.outputs)
    require(ends == (1, 1), f"from_nir: the graph must have one input and one output; got {ends}")
    sources = {
        name: [source for source, reader in graph.edges if reader == name] for name in graph.nodes
    }
    try:
        order = TopologicalSorter(sources).static_order()
        layers = {name: _layer(name, graph.nodes[name]) for name in order}
    except CycleError as error:
        raise ValueError(f"from_nir: the graph must have no loop; got {error.args[1]}") from error
    return NIRNetwork(layers, sources, *graph.outputs).eval()


def _layer(name: str, node: Any) -> nn.Module:
    builds: dict[Any, Callable[[], nn.Module]] = {
        nir.Input: nn.Identity,
        nir.Output: nn.Identity,
        nir.LIF: lambda: _neuron_of(name, node),
        nir.IF: lambda: _neuron_of(name, node),
        nir.Affine: lambda: _synapse_of(node),
        nir.Linear: lambda: _synapse_of(node),
        nir.Conv2d: lambda: _synapse_of(node),
        nir.Flatten: lambda: nn.Flatten(
            *(int(each + 2 if each >= 0 else each) for each in (node.start_dim, node.end_dim))
        ),
        nir.AvgPool2d: lambda: Pool(
            nn.AvgPool2d(*map(_pair, (node.kernel_size, node.stride, node.padding)))
        ),
    }
    require(
        type(node) in builds,
        f"from_nir: {name}: must be a layer that to_nir writes; got {type(node).__name__}",
    )
    return builds[type(node)]()


def _neuron_of(name: str, node: Any) -> LIF:
    arrays = {key: each for key, each in vars(node).items() if isinstance(each, np.ndarray)}
    values = {key: np.unique(each).tolist() for key, each in arrays.items()}
    leak = DT / values["tau"][0] if "tau" in values else 0.0
    gain = values["r"][0] * (leak or DT)
    is_scaled = bool(leak) and math.isclose(gain, leak)
    require(
        all(len(each) == 1 for each in values.values())
        and [0.0] == values["v_reset"] == values.get("v_leak", [0.0])
        and (is_scaled or math.isclose(gain, 1)),
        f"from_nir: {name}: all its neurons must have one v_threshold, one tau, v_reset and v_leak"
        f" 0, and r = 1 or tau / {DT:g} (an IF: r = {1 / DT:g}); got {values}",
    )
    return LIF(
        1 - leak,
        threshold=values["v_threshold"][0],
        comparison=">",
        reset="zero",
        scale_input=is_scaled,
    )


def _synapse_of(node: Any) -> nn.Module:
    weight = torch.tensor(node.weight)
    outputs, inputs, *size = weight.shape
    synapse: Any = Linear(inputs, outputs)
    if size:
        geometry: Any = (*map(_pair, (node.stride, node.padding, node.dilation)), int(node.groups))
        synapse = Conv2d(inputs * geometry[3], outputs, _pair(size), *geometry)
    bias = torch.tensor(getattr(node, "bias", np.zeros(outputs)))
    synapse.to(weight.dtype).load_state_dict({"weight": weight, "bias": bias})
    return synapse


def _pair(size: Any) -> Any:
    return tuple(int(each) for each in np.broadcast_to(size, 2))
