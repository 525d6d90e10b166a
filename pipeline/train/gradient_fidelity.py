"""Gradient fidelity while a run trains: the gradients of its rule and of SLTT, compared with
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
from pipeline.spiking.state import attribute_set
from pipeline.train.objective import Loss


def compare_gradients(
    recipe: Recipe,
    fresh: Callable[[], nn.Module],
    loss: Loss,
    x_TB: Tensor,
    target_B: Tensor,
    weights: Mapping[str, Tensor],
    learnt: Mapping[str, Tensor],
    *,
    step: int,
) -> Fidelity:
    """Compare the gradients on this batch with these state dicts of the network and the rule.

    Args:
        fresh: makes a network of the recipe without a rule.
        loss: on labels alone, without a teacher.
        step: the rule draws the random numbers of this batch.
    """
    network = fresh()
    network.load_state_dict(weights)
    own: Rule = recipe.rule.build()

    def of(rule: Rule, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return gradients(
            network,
            rule,
            x_TB,
            lambda: loss(target_B),
            world=World(recipe.seed),  # one rank: a mean over ranks would wait for the others
            over_time=recipe.over_time,
            rule_state=state,
            step=step,
        )

    # Only this rank compares, so batch norm must not wait for others.
    with attribute_set(batch_norms(network), "between", "rank"):
        known = {"BPTT": of(BPTT()), "SLTT": of(SLTT())}
        others = {
            "SLTT": [known["SLTT"]],
            own.label: [known.get(own.label) or of(own, learnt)],
        }
    return fidelity(known["BPTT"], known["SLTT"], others)
