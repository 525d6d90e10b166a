"""A network with 1-bit weights in a part of it: `model=spec(binarized, network=spec(convnet, ...),
part="all_but_ends")`.

A family names a part by the attribute `part` of the modules that make it up, and says no more about
it:

    class FeedForward(nn.Module):
        part = "ffn"

The synapses inside such modules are the part, whatever the network is wrapped in. Every network has
the part "all_but_ends": its synapses in order of registration but the first and the last (or all of
its `classifier`), as in binary networks since Rastegari et al. 2016 (XNOR-Net, arXiv 1603.05279),
and but those in a `shortcut`, which nothing leads around: they have been real since Liu et al. 2018
(Bi-Real, arXiv 1808.00278).
"""

from torch import nn
from torch.nn.modules.conv import _ConvNd

from pipeline.spiking.binary import Binarization, binarize
from pipeline.spiking.limit import Limited
from pipeline.spiking.linear_layers import is_inside

ALL_BUT_ENDS = "all_but_ends"


def binarized(network: nn.Module, *, part: str, weights: Binarization = "scaled") -> nn.Module:
    """`network` with 1-bit `weights` (`spiking/binary.py`) in its `part`, made of the weights that
    it has.

    Raises: ValueError for a part that the network does not have or that holds no weights, and for a
    layer in it whose weights cannot be 1-bit, by its name.
    """
    modules = dict(network.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, (nn.Linear, _ConvNd))]
    limited = [name for name, module in modules.items() if isinstance(module, Limited)]
    chosen = (
        _all_but_ends(modules, layers)
        if part == ALL_BUT_ENDS
        else _inside_part(network, part, layers)
    )
    if not chosen:
        raise ValueError(
            f"binarized: part must hold layers with weights; {part!r} of {type(network).__name__}"
            " holds none"
        )
    for name in chosen:
        if is_inside(name, limited):
            raise ValueError(
                f"binarized: weights that are limited in their norm cannot be 1-bit; got {name}"
            )
        try:
            binarize(modules[name], weights)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{error} at {name}") from error
    return network


def _all_but_ends(modules: dict[str, nn.Module], layers: list[str]) -> list[str]:
    classifiers = [name for name in modules if name.rpartition(".")[2] == "classifier"]
    heads = [name for name in layers if is_inside(name, classifiers)] or layers[-1:]
    return [name for name in layers[1:] if name not in heads and "shortcut" not in name.split(".")]


def _inside_part(network: nn.Module, part: str, layers: list[str]) -> list[str]:
    parts: dict[str, list[str]] = {}
    for name, module in network.named_modules():
        if isinstance(getattr(module, "part", None), str):
            parts.setdefault(module.part, []).append(name)  # type: ignore[arg-type]
    if part not in parts:
        raise ValueError(
            f"binarized: part must be one that the network has; {type(network).__name__} has "
            f"{', '.join([ALL_BUT_ENDS, *parts])}; got part={part!r}"
        )
    return [name for name in layers if is_inside(name, parts[part])]
