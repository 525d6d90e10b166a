"""Transforms of a network, used in recipes as `model=spec(binarized, network=spec(convnet, ...),
...)`.

    binarized       1-bit weights in a part of the network
    multi_head      one classifier per task
    late            logits of the last time steps only
    with_readouts   a linear readout after each neuron, for local learning
    synchronized    batch norm over the samples of all workers
"""

# T time, B batch, C channels, K classes

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pipeline.core.checks import refuse_unless_counts, require
from pipeline.spiking.binary import Binarization, binarize
from pipeline.spiking.local_learning import Readout
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import batch_norms
from pipeline.spiking.norm_limit import LimitedSynapse
from pipeline.spiking.state import State
from pipeline.spiking.synapse import Conv2d, Linear, is_inside


def binarized(network: nn.Module, *, part: str, weights: Binarization = "scaled") -> nn.Module:
    """`network` with 1-bit `weights` (`spiking/binary.py`) in its `part`.

    Its weights become the latent weights.

    An attribute `part` of modules names a part, such as `part = "ffn"`. The part consists of all
    synapses inside these modules. Every network has the part "all_but_ends": all synapses in order
    of registration, with three exceptions. The first and the last one (or all of its `classifier`)
    are exempt, as in binary networks since Rastegari et al. 2016 (XNOR-Net, arXiv 1603.05279).
    Those in a `shortcut` are exempt too: no connection bypasses a shortcut, so its weights have
    been real since Liu et al. 2018 (Bi-Real, arXiv 1808.00278).

    Raises: ValueError for a part that the network does not have or that holds no weights, and for a
    layer whose weights cannot be 1-bit, by its name.
    """
    modules = dict(network.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, (nn.Linear, _ConvNd))]
    limited = [name for name, module in modules.items() if isinstance(module, LimitedSynapse)]
    classifiers = [name for name in modules if name.rpartition(".")[2] == "classifier"]
    places: dict[str, list[str]] = {}
    for name, module in modules.items():
        if isinstance(named := getattr(module, "part", None), str):
            places.setdefault(named, []).append(name)
    ends = [name for name in layers if is_inside(name, classifiers)] or layers[-1:]
    inner = [name for name in layers[1:] if name not in ends and "shortcut" not in name.split(".")]
    parts = {"all_but_ends": inner} | {
        each: [name for name in layers if is_inside(name, inside)]
        for each, inside in places.items()
    }
    require(
        part in parts,
        f"binarized: part must be one that the network has; {type(network).__name__} has"
        f" {', '.join(parts)}; got part={part!r}",
    )
    chosen = parts[part]
    require(
        chosen,
        f"binarized: part must hold layers with weights; {part!r} of {type(network).__name__}"
        " holds none",
    )
    for name in chosen:
        require(
            not is_inside(name, limited),
            f"binarized: weights that are limited in their norm cannot be 1-bit; got {name}",
        )
        try:
            binarize(modules[name], weights)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{error} at {name}") from error
    return network


class MultiHead(nn.Module):
    """One classifier per task, of which `selected` is used: `[T, B, C]` to `[T, B, K]`.

    `selected` is a plain attribute, set by `select_head`, so `state_dict` does not depend on it.
    The other heads are outside the graph and get no gradient.
    """

    # Marks networks with a new Jacobian in each task, for rules that estimate it.
    has_task_heads = True

    def __init__(self, heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.selected = 0

    def forward(self, x_TB: Tensor) -> Tensor:
        return self.heads[self.selected](x_TB)


def multi_head(network: nn.Module, *, heads: int) -> nn.Module:
    """`network` with `heads` copies of its `classifier`, all with its initial weights.

    Each phase of a recipe selects its head.

    Raises: ValueError for fewer than one head, or a network without a module `classifier`.
    """
    classifier: Any = getattr(network, "classifier", None)
    require(
        heads >= 1 and isinstance(classifier, nn.Module),
        "multi_head: needs heads >= 1 and a network with a module `classifier`; got"
        f" heads={heads}, {type(network).__name__}",
    )
    network.classifier = MultiHead(copy.deepcopy(classifier) for _ in range(heads))
    return network


def select_head(network: nn.Module, head: int) -> None:
    """Select head number `head` of every MultiHead in `network`.

    Raises: ValueError for a network without several heads, or a head that it does not have.
    """
    heads = [module for module in network.modules() if isinstance(module, MultiHead)]
    require(
        heads,
        "select_head: the network must have several heads, see multi_head; got"
        f" {type(network).__name__}",
    )
    for module in heads:
        require(
            0 <= head < len(module.heads),
            f"select_head: head must be in 0..{len(module.heads) - 1}; got {head}",
        )
        module.selected = head


class LateReadout(nn.Module):
    """Scale the last n of T steps and silence all others, for recordings whose class shows late.

        y[t] = T / n x[t]  in the last n of T steps, 0 before;   n = share T, rounded, at least 1

    The mean of y over T is the mean of x over the last n steps, which is the prediction. The loss
    of an earlier step is that of zero logits, log K, without gradient. The module counts time steps
    from `fresh_state` on, so slices may have any length; `time_steps` is T.

    Raises: ValueError for a share outside 0..1 or fewer than one step (when made), and for more
    steps than T.
    """

    def __init__(self, *, share: float, time_steps: int) -> None:
        super().__init__()
        refuse_unless_counts("LateReadout", {"time_steps": time_steps})
        require(
            0 < share <= 1, f"LateReadout: share must be in 0..1, 0 excluded; got share={share}"
        )
        self.time_steps = time_steps
        self.late = max(1, round(share * time_steps))
        self.state = State("LateReadout")

    def forward(self, x_TBK: Tensor) -> Tensor:
        seen = self.state.read("seen")
        first = 0 if seen is None else int(seen)
        last = first + len(x_TBK)
        require(
            last <= self.time_steps,
            f"LateReadout: a recording must have {self.time_steps} time steps; got step {last}",
        )
        self.state.write("seen", torch.tensor(last))
        scale_T = x_TBK.new_tensor(
            [step >= self.time_steps - self.late for step in range(first, last)]
        ) * (self.time_steps / self.late)
        return x_TBK * scale_T.view(-1, *[1] * (x_TBK.dim() - 1))


def late(network: nn.Module, *, share: float = 0.5, time_steps: int) -> nn.Sequential:
    """`network` with a `LateReadout` of the last `share` of its `time_steps`."""
    return nn.Sequential(network, LateReadout(share=share, time_steps=time_steps))


def with_readouts(
    network: nn.Module, classes: int = 10, *, cells: int | Sequence[int] = 1
) -> nn.Module:
    """`network` with a `Readout` after each LIF; its output does not change.

    A readout has as many channels as the synapse before its neuron, in order of registration. It
    reads `cells` x `cells` regions of an image; `cells` is one number, or one per neuron.

    Raises: ValueError for a network without neurons, a neuron without a synapse before it, a wrong
    number of `cells`, or classes that differ from the network's.
    """
    modules = list(network.named_modules())
    neurons = sum(isinstance(module, LIF) for _, module in modules)
    require(
        neurons, f"with_readouts: the network must have LIF neurons; got {type(network).__name__}"
    )
    every = [cells] * neurons if isinstance(cells, int) else list(cells)
    require(
        len(every) == neurons,
        f"with_readouts: cells must be one number, or one for each of {neurons} neurons; got"
        f" {every}",
    )
    cells_of, synapse = iter(every), None
    for name, module in modules:
        if isinstance(module, (Conv2d, Linear)):
            synapse = module
        elif isinstance(module, LIF):
            if synapse is None:
                raise ValueError(
                    "with_readouts: a synapse must stand in front of each neuron; got none before"
                    f" {name}"
                )
            count = next(cells_of)  # regions a side; used only behind a convolution
            readout = Readout(
                len(synapse.weight), classes, cells=count if isinstance(synapse, Conv2d) else 1
            )
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, nn.Sequential(module, readout))
    outputs = None if synapse is None else len(synapse.weight)
    require(
        outputs == classes,
        f"with_readouts: classes must be those of the network; got {classes}, and {outputs}"
        " outputs",
    )
    return network


def synchronized(network: nn.Module) -> nn.Module:
    """`network` whose batch norms use the samples of all workers.

    It sets `between="world"` (`spiking/norm.py`).

    It is for micro-batches that are too small for their own statistics. It costs one collective per
    norm in the forward and one in the backward, for every time step that is passed to the network
    separately; under `over="time"`, one for all steps.

    Raises: ValueError for a network without batch norm.
    """
    norms = batch_norms(network)
    require(
        norms,
        f"synchronized: the network must have batch norm; got {type(network).__name__} without any",
    )
    for norm in norms:
        norm.between = "world"
    return network
