"""Plain linear layers of a model, for rules that control the change of W x exactly."""

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from pipeline.core.checks import require
from pipeline.spiking.limit import LimitedSynapse
from pipeline.spiking.norm import is_foreign_norm
from pipeline.spiking.synapse import Conv2d, Linear


def plain_synapses(
    who: str, model: nn.Module, *, skip: Sequence[str] = ()
) -> dict[str, Linear | Conv2d]:
    """Every Linear and Conv2d outside the modules in `skip`, by name, in order of registration.

    Raises: ValueError, in the name of `who`, for a weight that is not a plain parameter
    (standardised, parametrised, norm-limited, of another class), a matrix outside the synapses, two
    synapses that share a weight, groups, a batch norm other than spiking.norm's, or an entry of
    `skip` that is not a module.
    """
    modules = dict(model.named_modules())
    for name in skip:
        require(name in modules, f"{who}: skip must name modules of the model; got {name!r}")
    synapses: dict[str, Linear | Conv2d] = {}
    for name, module in modules.items():
        if is_inside(name, skip):
            continue
        why = _why_not(module)
        require(
            why is None,
            f"{who}: every layer must be a plain Linear or Conv2d, whose weight is the"
            f" parameter itself; got {why} at {name or 'the model itself'}",
        )
        if isinstance(module, (Linear, Conv2d)):
            synapses[name] = module
    weights = {id(synapse.weight) for synapse in synapses.values()}
    for name, parameter in named_parameters(model, skip=skip):
        require(
            parameter.dim() <= 1 or id(parameter) in weights,
            f"{who}: every matrix must be the weight of a Linear or Conv2d; got {name}",
        )
    require(
        synapses and len(weights) >= len(synapses),
        f"{who}: the model must have synapses, each with a weight of its own; got"
        f" {', '.join(synapses) or 'none'}",
    )
    return synapses


def named_parameters(
    model: nn.Module, *, skip: Sequence[str] = ()
) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters outside the modules in `skip`."""
    return (
        (name, parameter)
        for name, parameter in model.named_parameters()
        if not is_inside(name, skip)
    )


def is_inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a dotted name is one of `modules` or lies in one."""
    return any(name == each or name.startswith(each + ".") for each in modules)


def _why_not(module: nn.Module) -> str | None:
    """The reason why a module is refused, or None."""
    if is_foreign_norm(module):
        return (
            f"{type(module).__name__}, which cannot be frozen (pipeline.spiking.norm.BatchNorm"
            " can),"
        )
    if isinstance(module, LimitedSynapse):
        return f"{type(module).__name__}, which scales the weight,"
    if not isinstance(module, (nn.Linear, _ConvNd)):
        return None
    if not isinstance(module, (Linear, Conv2d)):
        return f"torch's {type(module).__name__}"
    if module.weights != "plain":
        return f"{module.weights} weights"
    if is_parametrized(module):
        return "parametrised weights"
    if isinstance(module, Conv2d) and module.groups > 1:
        return f"groups={module.groups}"
    return None
