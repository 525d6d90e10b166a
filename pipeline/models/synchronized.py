"""Batch norm by the samples of all workers: `model=spec(synchronized, network=spec(convnet, ...))`.

For micro-batches too small for statistics of their own. It costs a collective for each norm,
forward and backward, at every time step that is given to the network by itself; under
`over="time"`, one for all of them.
"""

from torch import nn

from pipeline.spiking.norm import batch_norms


def synchronized(network: nn.Module) -> nn.Module:
    """`network` whose batch norms normalise by the samples of all workers (`between="world"`,
    `spiking/norm.py`).

    Raises: ValueError for a network without batch norm.
    """
    norms = batch_norms(network)
    if not norms:
        raise ValueError(
            f"synchronized: the network must have batch norm; got {type(network).__name__}"
            " without any"
        )
    for norm in norms:
        norm.between = "world"
    return network
