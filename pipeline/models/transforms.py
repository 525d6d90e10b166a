"""Transforms of a network.

They are parts of a recipe, for example `model=spec(late, network=spec(convnet), time_steps=4)`.

    binarized       1-bit weights in a part of the network
    multi_head      one classifier per task
    late            logits of the last time steps only
    with_readouts   a linear readout after each neuron, for local learning
    synchronized    batch norm over the samples of all workers
    frozen          weights that stay as they are, except those of the classifier
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
from pipeline.spiking.norm import batch_norms, is_foreign_norm
from pipeline.spiking.norm_limit import LimitedSynapse
from pipeline.spiking.state import State
from pipeline.spiking.synapse import Conv2d, Linear, is_inside


def binarized(network: nn.Module, *, part: str, weights: Binarization = "scaled") -> nn.Module:
    """`network` with 1-bit `weights` (`spiking/binary.py`) in its `part`.

    The real weights of the part become its latent weights.

    A module belongs to a part by its attribute `part`, such as `part = "ffn"`. A part consists of
    all synapses inside its modules. Every network has the part "all_but_ends". This part excludes
    the first registered synapse and all synapses of the `classifier` (without a `classifier`, the
    last synapse), as in Rastegari et al. 2016 (XNOR-Net, arXiv 1603.05279). It also excludes
    synapses in a `shortcut`. No connection bypasses a shortcut, so its weights stay real, as in Liu
    et al. 2018 (Bi-Real, arXiv 1808.00278).

    Raises: ValueError for a part that the network does not have or that has no weights, and for a
    layer whose weights cannot be 1-bit.
    """
    modules = dict(network.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, (nn.Linear, _ConvNd))]
    limited = [name for name, module in modules.items() if isinstance(module, LimitedSynapse)]
    classifiers = [name for name in modules if name.rpartition(".")[2] == "classifier"]
    modules_by_part: dict[str, list[str]] = {}
    for name, module in modules.items():
        if isinstance(part_name := getattr(module, "part", None), str):
            modules_by_part.setdefault(part_name, []).append(name)
    last = [name for name in layers if is_inside(name, classifiers)] or layers[-1:]
    inner = [name for name in layers[1:] if name not in last and "shortcut" not in name.split(".")]
    parts = {"all_but_ends": inner} | {
        part_name: [name for name in layers if is_inside(name, part_modules)]
        for part_name, part_modules in modules_by_part.items()
    }
    require(
        part in parts,
        f"binarized: part must be a part of the network; {type(network).__name__} has"
        f" {', '.join(parts)}; got part={part!r}",
    )
    require(
        parts[part],
        f"binarized: part must have layers with weights; {part!r} of {type(network).__name__}"
        " has none",
    )
    for name in parts[part]:
        require(
            not is_inside(name, limited),
            f"binarized: weights with a limited norm cannot be 1-bit; got {name}",
        )
        try:
            binarize(modules[name], weights)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{error} at {name}") from error
    return network


class MultiHead(nn.Module):
    """One classifier per task: `[T, B, C]` to `[T, B, K]`.

    `selected` is the index of the classifier in use. `select_head` sets it. It is a plain
    attribute, so `state_dict` does not depend on it. The other heads are outside the graph and get
    no gradient.
    """

    # The Jacobian of the network changes with the task, which matters to rules that estimate it.
    has_task_heads = True

    def __init__(self, heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.selected = 0

    def forward(self, x_TB: Tensor) -> Tensor:
        return self.heads[self.selected](x_TB)


def multi_head(network: nn.Module, *, heads: int) -> nn.Module:
    """`network` with `heads` copies of its `classifier`, all with the same initial weights.

    Each phase of a recipe selects its head.

    Raises: ValueError for fewer than one head, or a network without a module `classifier`.
    """
    classifier: Any = getattr(network, "classifier", None)
    require(
        heads >= 1 and isinstance(classifier, nn.Module),
        "multi_head: heads must be >= 1, and the network must have a module `classifier`; got"
        f" heads={heads}, {type(network).__name__}",
    )
    network.classifier = MultiHead(copy.deepcopy(classifier) for _ in range(heads))
    return network


def select_head(network: nn.Module, head: int) -> None:
    """Select head number `head` of every MultiHead in `network`.

    Raises: ValueError for a network without a MultiHead, or a number without a head.
    """
    multi_heads = [module for module in network.modules() if isinstance(module, MultiHead)]
    require(
        multi_heads,
        "select_head: the network must have several heads, see multi_head; got"
        f" {type(network).__name__}",
    )
    for module in multi_heads:
        require(
            0 <= head < len(module.heads),
            f"select_head: head must be in 0..{len(module.heads) - 1}; got {head}",
        )
        module.selected = head


class LateReadout(nn.Module):
    """Scales the logits of the last n of T steps, and sets all earlier logits to 0.

        y[t] = (T / n) x[t]  in the last n of T steps, 0 before;   n = share T, rounded, at least 1

    It is for recordings whose class becomes visible late. The prediction is the mean of y over T,
    which is the mean of x over the last n steps. Earlier steps have no gradient, and their
    cross-entropy is log K. The module counts time steps since the start of `fresh_state`, so slices
    may have any length; `time_steps` is T.

    Raises: ValueError for a share of 0 or outside 0..1, or `time_steps` below 1; in `forward` for
    more than T steps.
    """

    def __init__(self, *, share: float, time_steps: int) -> None:
        super().__init__()
        refuse_unless_counts("LateReadout", {"time_steps": time_steps})
        require(
            0 < share <= 1, f"LateReadout: share must be in 0..1, 0 excluded; got share={share}"
        )
        self.time_steps = time_steps
        self.late_steps = max(1, round(share * time_steps))
        self.state = State("LateReadout")

    def forward(self, x_TBK: Tensor) -> Tensor:
        steps = self.state.read("steps")
        start = 0 if steps is None else int(steps)
        end = start + len(x_TBK)
        require(
            end <= self.time_steps,
            f"LateReadout: a recording must have {self.time_steps} time steps; got step {end}",
        )
        self.state.write("steps", torch.tensor(end))
        first_late = self.time_steps - self.late_steps
        scale_T = x_TBK.new_tensor([step >= first_late for step in range(start, end)])
        scale_T *= self.time_steps / self.late_steps
        return x_TBK * scale_T.view(-1, *[1] * (x_TBK.dim() - 1))


def late(network: nn.Module, *, share: float = 0.5, time_steps: int) -> nn.Sequential:
    """`network` with a `LateReadout` for the last `share`, a fraction of its `time_steps`."""
    return nn.Sequential(network, LateReadout(share=share, time_steps=time_steps))


def with_readouts(
    network: nn.Module, classes: int = 10, *, cells: int | Sequence[int] = 1
) -> nn.Module:
    """`network` with a `Readout` after each LIF; its output does not change.

    A readout has as many channels as the synapse that is registered last before its neuron. Behind
    a convolution it averages the image over `cells` x `cells` regions. Behind a fully connected
    layer `cells` has no effect. `cells` is one number, or one per neuron.

    Raises: ValueError for a network without LIF neurons, a neuron without a synapse before it,
    `cells` below 1 behind a convolution, a list `cells` that does not have one number per neuron,
    or classes that differ from the network's.
    """
    modules = list(network.named_modules())
    neurons = sum(isinstance(module, LIF) for _, module in modules)
    require(
        neurons, f"with_readouts: the network must have LIF neurons; got {type(network).__name__}"
    )
    cells_per_neuron = [cells] * neurons if isinstance(cells, int) else list(cells)
    require(
        len(cells_per_neuron) == neurons,
        f"with_readouts: cells must be one number, or one number for each of the {neurons} neurons;"
        f" got {cells_per_neuron}",
    )
    synapse = None
    for name, module in modules:
        if isinstance(module, (Conv2d, Linear)):
            synapse = module
        elif isinstance(module, LIF):
            if synapse is None:
                raise ValueError(
                    "with_readouts: a synapse must be registered before each neuron; got none"
                    f" before {name}"
                )
            neuron_cells = cells_per_neuron.pop(0)
            readout = Readout(
                len(synapse.weight),
                classes,
                cells=neuron_cells if isinstance(synapse, Conv2d) else 1,
            )
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, nn.Sequential(module, readout))
    outputs = None if synapse is None else len(synapse.weight)
    require(
        outputs == classes,
        f"with_readouts: classes must be the network's number of outputs, {outputs}; got"
        f" classes={classes}",
    )
    return network


def frozen(network: nn.Module) -> nn.Module:
    """`network` of which only the `classifier` trains.

    The other parameters get no gradient, and the other batch norms use their running statistics.

    Raises: ValueError for a network without a module `classifier`, or with batch norm of torch.
    """
    classifier: Any = getattr(network, "classifier", None)
    require(
        isinstance(classifier, nn.Module),
        f"frozen: the network must have a module `classifier`; got {type(network).__name__}",
    )
    foreign = [name for name, module in network.named_modules() if is_foreign_norm(module)]
    require(
        not foreign,
        f"frozen: batch norm must be pipeline.spiking.norm.BatchNorm; got torch's at {foreign[:1]}",
    )
    network.requires_grad_(False)
    classifier.requires_grad_(True)
    own = batch_norms(classifier)
    for norm in batch_norms(network):
        norm.frozen = norm not in own
    return network


def synchronized(network: nn.Module) -> nn.Module:
    """`network` whose batch norms use the samples of all workers.

    The function sets `between="world"` (`spiking/norm.py`), for micro-batches that are too small
    for their own statistics. Each norm costs one collective in the forward and one in the backward
    for every time step, or under `over="time"` for every call.

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
