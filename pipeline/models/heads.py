"""Classifiers for several tasks: a head for each, of which the task's own answers. A shared head is
any network's classifier.
"""

# T time, B batch, C channels, K classes

import copy
from collections.abc import Iterable

from torch import Tensor, nn


class MultiHead(nn.Module):
    """One classifier for each task, of which the `selected` one answers: `[T, B, C]` to `[T, B,
    K]`.

    `selected` is a plain attribute, set by `select_head`: `state_dict` is the same whichever head
    is selected. The others are out of the graph and get no gradient.

    Raises: ValueError for no heads.
    """

    has_task_heads = True
    """what a rule looks for that learns something of each head"""

    def __init__(self, heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        if not len(self.heads):
            raise ValueError("MultiHead: needs at least one head; got none")
        self.selected = 0

    def forward(self, x_TB: Tensor) -> Tensor:
        return self.heads[self.selected](x_TB)

    def extra_repr(self) -> str:
        return f"selected={self.selected}"


def multi_head(network: nn.Module, *, heads: int) -> nn.Module:
    """`network` with its `classifier` as many times as there are `heads`, all with the weights that
    it was initialised with.

    In a recipe `model=spec(multi_head, network=spec(mlp, classes=2), heads=5)`; its phases say
    which head is theirs.

    Raises: ValueError for fewer than one head, or a network whose classifier has another name.
    """
    classifier = getattr(network, "classifier", None)
    if heads < 1 or not isinstance(classifier, nn.Module):
        raise ValueError(
            "multi_head: needs heads >= 1 and a network with a module `classifier`; got"
            f" heads={heads}, {type(network).__name__}"
        )
    network.classifier = MultiHead(copy.deepcopy(classifier) for _ in range(heads))
    return network


def select_head(network: nn.Module, head: int) -> None:
    """Make head number `head` answer, wherever `network` (or what it is wrapped in) has several.

    Raises: ValueError for a network with one head for all, or a head that it does not have.
    """
    found = [module for module in network.modules() if isinstance(module, MultiHead)]
    if not found:
        raise ValueError(
            "select_head: the network must have several heads, see multi_head; got"
            f" {type(network).__name__}"
        )
    for module in found:
        if not 0 <= head < len(module.heads):
            raise ValueError(f"select_head: head must be in 0..{len(module.heads) - 1}; got {head}")
        module.selected = head
