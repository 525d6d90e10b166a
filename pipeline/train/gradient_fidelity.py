"""How near the rule of a run is to BPTT while it trains: their gradients on one batch, with the
weights of the moment.
"""

# T time, B batch

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from pipeline.core.units import counted
from pipeline.measure.fidelity import Fidelity, fidelity, gradients
from pipeline.recipe.recipe import Recipe
from pipeline.rules.base import Rule, World
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.norm import local_statistics
from pipeline.train.objective import Loss


class Nearness:
    """Compares the gradients of a recipe's rule, and of SLTT, with BPTT's.

    Args:
        fresh: a network of the recipe, which no rule is attached to.
        loss: on labels alone, as no teacher is asked.
    """

    def __init__(
        self,
        recipe: Recipe,
        fresh: Callable[[], nn.Module],
        loss: Loss,
        x_TB: Tensor,
        target_B: Tensor,
    ) -> None:
        self.recipe, self.fresh, self.loss, self.x_TB, self.target_B = (
            recipe,
            fresh,
            loss,
            x_TB,
            target_B,
        )

    def __call__(
        self, weights: Mapping[str, Tensor], learnt: Mapping[str, Tensor], *, step: int
    ) -> Fidelity:
        """With state dicts: `weights`, what the rule has `learnt` by itself. The rule draws what it
        would for batch `step`.
        """
        network = self.fresh()
        network.load_state_dict(weights)
        own: Rule = self.recipe.rule.build()
        with local_statistics(network):  # the other ranks do not compare
            bptt, sltt = self._of(network, BPTT(), step), self._of(network, SLTT(), step)
            known = {"BPTT": bptt, "SLTT": sltt}
            others = {
                "SLTT": [sltt],
                own.label: [known.get(own.label) or self._of(network, own, step, learnt)],
            }
        return fidelity(bptt, sltt, others)

    @staticmethod
    def check(recipe: Recipe, fresh: Callable[[], nn.Module]) -> None:
        """Raises: ValueError for tasks, or where BPTT or SLTT cannot train the network: there is
        nothing to compare with.
        """
        if recipe.phases:
            raise ValueError(
                "recipe: evaluation.fidelity_every is of one task; got"
                f" {counted(len(recipe.phases), 'phase')}"
            )
        try:
            for rule in (BPTT(), SLTT()):
                rule.attach(fresh(), over_time=recipe.over_time)
        except ValueError as error:
            raise ValueError(
                f"recipe: evaluation.fidelity_every compares with BPTT and SLTT; {error}"
            ) from None

    def _of(
        self, network: nn.Module, rule: Rule, step: int, learnt: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        # Of one rank: it alone compares, and a mean over ranks would wait for the others.
        about = {
            "world": World(self.recipe.seed),
            "over_time": self.recipe.over_time,
            "learnt": learnt,
            "step": step,
        }
        return gradients(network, rule, self.x_TB, lambda: self.loss(self.target_B), **about)
