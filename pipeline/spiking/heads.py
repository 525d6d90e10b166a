"""A classifier with a head for each of several tasks: beside the neurons and synapses, as rules ask whether a network has one."""

# T time, B batch, C channels, K classes

from collections.abc import Iterable

from torch import Tensor, nn


class MultiHead(nn.Module):
    """One classifier for each task, of which the `selected` one answers: `[T, B, C]` to `[T, B, K]`.

    `selected` is a plain attribute, set by `models.heads.select_head`: `state_dict` is the same whichever head is selected. The
    others are out of the graph and get no gradient.

    Raises: ValueError for no heads.
    """

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
