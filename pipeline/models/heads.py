"""Classifiers for several tasks: a head for each, of which the task's own answers. A shared head is any network's classifier."""

import copy

from torch import nn

from pipeline.spiking.heads import MultiHead


def multi_head(network: nn.Module, *, heads: int) -> nn.Module:
    """`network` with its `classifier` as many times as there are `heads`, all with the weights that it was initialised with.

    In a recipe `model=spec(multi_head, network=spec(mlp, classes=2), heads=5)`; its phases say which head is theirs.

    Raises: ValueError for fewer than one head, or a network whose classifier has another name.
    """
    classifier = getattr(network, "classifier", None)
    if heads < 1 or not isinstance(classifier, nn.Module):
        raise ValueError(
            f"multi_head: needs heads >= 1 and a network with a module `classifier`; got heads={heads}, {type(network).__name__}"
        )
    network.classifier = MultiHead(copy.deepcopy(classifier) for _ in range(heads))
    return network


def select_head(network: nn.Module, head: int) -> None:
    """Make head number `head` answer, wherever `network` (or what it is wrapped in) has several.

    Raises: ValueError for a network with one head for all, or a head that it does not have.
    """
    found = [module for module in network.modules() if isinstance(module, MultiHead)]
    if not found:
        raise ValueError(f"select_head: the network must have several heads, see multi_head; got {type(network).__name__}")
    for module in found:
        if not 0 <= head < len(module.heads):
            raise ValueError(f"select_head: head must be in 0..{len(module.heads) - 1}; got {head}")
        module.selected = head
