"""Gradient fidelity while a run trains: the rule's gradient compared with BPTT's, on one batch and
with the current weights.
"""

# T time, B batch

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


class FidelityCheck:
    """Compares the gradients of a recipe's rule, and of SLTT, with BPTT's.

    Args:
        fresh: makes a network of the recipe without a rule.
        loss: on labels alone, without a teacher.
    """

    def __init__(
        self,
        recipe: Recipe,
        fresh: Callable[[], nn.Module],
        loss: Loss,
        x_TB: Tensor,
        target_B: Tensor,
    ) -> None:
        self.recipe, self.fresh, self.loss = recipe, fresh, loss
        self.x_TB, self.target_B = x_TB, target_B

    def __call__(
        self, weights: Mapping[str, Tensor], learnt: Mapping[str, Tensor], *, step: int
    ) -> Fidelity:
        """Compare with these state dicts of the network and the rule. The rule draws the random
        numbers of batch `step`.
        """
        network = self.fresh()
        network.load_state_dict(weights)
        own: Rule = self.recipe.rule.build()
        with local_statistics(network):  # only this rank compares
            bptt, sltt = self._of(network, BPTT(), step), self._of(network, SLTT(), step)
            known = {"BPTT": bptt, "SLTT": sltt}
            others = {
                "SLTT": [sltt],
                own.label: [known.get(own.label) or self._of(network, own, step, learnt)],
            }
        return fidelity(bptt, sltt, others)

    @staticmethod
    def check(recipe: Recipe, fresh: Callable[[], nn.Module]) -> None:
        """Raises: ValueError if there are several tasks, or BPTT or SLTT cannot train the
        network.
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
        return gradients(
            network,
            rule,
            self.x_TB,
            lambda: self.loss(self.target_B),
            world=World(self.recipe.seed),  # one rank: a mean over ranks would wait for the others
            over_time=self.recipe.over_time,
            learnt=learnt,
            step=step,
        )
