"""What the tests of rules share: a batch, a loss, and gradients by a rule."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.rules.base import LossTerm, Rule
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Linear
from tests.helpers.saved import SavedBytes

FEATURES, CLASSES, SEED = 6, 3, 8


def drawn(model: nn.Module, *, seed: int, scale: float = 0.9) -> Any:
    """The model in float64 with normal weights, the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.double().parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(scale * noise)
    return model


def lif_network(**neuron) -> nn.Sequential:
    """Two hidden layers that spike at about a third of the steps on `batch`, in float64."""
    layers = (Linear(FEATURES, 8), LIF(**neuron), Linear(8, 7), LIF(**neuron), Linear(7, CLASSES))
    return drawn(nn.Sequential(*layers), seed=SEED)


def batch(
    steps: int, *, size: int = 5, features: int = FEATURES, classes: int = CLASSES
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(steps)
    x_TBC = 1.5 * torch.randn(steps, size, features, generator=generator, dtype=torch.float64)
    return x_TBC, torch.randint(classes, (size,), generator=generator)


def cross_entropy(target_B: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits_BK: F.cross_entropy(logits_BK, target_B)


def learn(loss_terms: Iterable[LossTerm]) -> list[LossTerm]:
    """Differentiate each objective as it comes, as the training loop does."""
    seen = []
    for objective in loss_terms:
        if objective.backward is not None:
            objective.backward.backward()
        seen.append(objective)
    return seen


def outputs(model: nn.Module, *slices_TB: Tensor, grad: bool = False) -> Tensor:
    """The outputs for the slices of one batch, which begins with a fresh state."""
    with torch.set_grad_enabled(grad), fresh_state(model):
        return torch.cat([model(x_TB) for x_TB in slices_TB])


class Network(nn.Module):
    """Named modules, put together by a function of the network and its input."""

    def __init__(self, put_together: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.put_together = put_together
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x_TB: Tensor) -> Tensor:
        return self.put_together(self, x_TB)


def attached(rule: Rule, model: nn.Module | None = None, **about) -> tuple[Any, Any]:
    """The rule attached to the model, or to a `lif_network`."""
    model = lif_network() if model is None else model
    rule.attach(model, **about)
    return rule, model


def one_batch(
    rule: Rule, model: nn.Module, steps: int, *, step: int | None = None, **attach
) -> list[LossTerm]:
    """Attach the rule and differentiate the loss of `batch(steps)`."""
    x_TBC, target_B = batch(steps)
    rule.attach(model, **attach)
    return learn(rule.loss_terms(model, x_TBC, cross_entropy(target_B), step=step))


def gradients(
    rule: Rule, model: nn.Module, x_TB: Tensor, loss_fn, *, step: int = 0, **attach
) -> dict[str, Tensor]:
    """The gradient of every parameter that one batch gives under `rule`; the model is as before
    afterwards.
    """
    model.zero_grad()
    rule.attach(model, **attach)
    try:
        learn(rule.loss_terms(model, x_TB, loss_fn, step=step))
    finally:
        rule.release()
    found = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
    }
    model.zero_grad()
    return found


def gradients_on(
    steps: int, model: nn.Module, *rules: Rule, **attach
) -> tuple[dict[str, Tensor], ...]:
    """The gradients that `batch(steps)` gives under each of the rules."""
    x_TBC, target_B = batch(steps)
    return tuple(gradients(rule, model, x_TBC, cross_entropy(target_B), **attach) for rule in rules)


def saved_peak(rule: Rule, model: nn.Module, x_TB: Tensor, target_B: Tensor, **attach) -> int:
    """The most bytes that one batch keeps for its backward."""
    rule.attach(model, **attach)
    with SavedBytes(model) as saved:
        learn(rule.loss_terms(model, x_TB, cross_entropy(target_B)))
    return saved.peak


def spikes_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """Fills with the output of every LIF as the model runs."""
    record: dict[str, list[Tensor]] = {}

    def keep(name: str, s_TB: Tensor) -> None:
        record[name].append(s_TB.detach())

    for name, module in model.named_modules():
        if isinstance(module, LIF):
            record[name] = []
            hook: Any = lambda _module, _x, s_TB, name=name: keep(name, s_TB)
            module.register_forward_hook(hook)
    return record


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two sets of gradients."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def refusals(cases: Iterable[tuple[Any, str]], build: Callable[..., Any] | None = None) -> Any:
    """A test for all that a module refuses.

    A case is a call, or choices for `build`, and a pattern for the message of its ValueError.
    """

    @pytest.mark.parametrize(("call", "message"), cases)
    def test(call: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call() if build is None else build(**call)

    return test
