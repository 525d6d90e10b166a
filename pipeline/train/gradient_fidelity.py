"""Gradient fidelity during training: compares the gradients of the run's rule and of SLTT with
BPTT's, on one batch and with the current weights.
"""

# T time, B batch

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from pipeline.measure.gradient_similarity import Fidelity, fidelity, gradients
from pipeline.recipe.recipe import Recipe
from pipeline.rules.base import Rule, World
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.norm import batch_norms
from pipeline.spiking.state import set_temporarily
from pipeline.train.objective import Loss


def compare_gradients(
    recipe: Recipe,
    make_network: Callable[[], nn.Module],
    loss: Loss,
    x_TB: Tensor,
    target_B: Tensor,
    network_state: Mapping[str, Tensor],
    rule_state: Mapping[str, Tensor],
    *,
    step: int,
) -> Fidelity:
    """Compare the gradients of the rules on one batch.

    Args:
        make_network: builds the recipe's network, without a rule.
        loss: the loss on labels alone, without a teacher.
        network_state: the state dict of the network.
        rule_state: the state dict of the recipe's rule.
        step: the step of the run. It determines the rule's random draws.
    """
    network = make_network()
    network.load_state_dict(network_state)

    def gradients_of(rule: Rule, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return gradients(
            network,
            rule,
            x_TB,
            lambda: loss(target_B),
            world=World(recipe.seed),  # one rank, because the other ranks do not compare
            over_time=recipe.over_time,
            rule_state=state,
            step=step,
        )

    rule: Rule = recipe.rule.build()
    # Batch norm must not wait for the other ranks, which do not compare.
    with set_temporarily(batch_norms(network), "between", "rank"):
        by_rule = {"BPTT": gradients_of(BPTT()), "SLTT": gradients_of(SLTT())}
        if rule.label not in by_rule:
            by_rule[rule.label] = gradients_of(rule, rule_state)
    return fidelity(
        by_rule["BPTT"],
        by_rule["SLTT"],
        {label: [by_rule[label]] for label in ("SLTT", rule.label)},
    )
