"""A network that learns by one rule under a clock, for benchmarks that let several take turns on
the same images.
"""

import statistics
import time

from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.rules.base import Rule
from pipeline.train.objective import CrossEntropy


class Trainee:
    """Timed are forward, loss and backward of all T steps; the optimizer's step, which knows no
    rule, comes after the clock.

    Without an optimizer the weights stay as they are.
    """

    def __init__(
        self, network: nn.Module, rule: Rule, *, optimizer: Optimizer | None = None
    ) -> None:
        self.network, self.rule, self.optimizer = network, rule, optimizer
        rule.attach(network)
        self.seconds: list[float] = []

    def learn(self, x_TB: Tensor, target_B: Tensor) -> None:
        began = time.perf_counter()
        for objective in self.rule.loss_terms(self.network, x_TB, CrossEntropy()(target_B)):
            if objective.backward is not None:
                objective.backward.backward()
        self.seconds.append(time.perf_counter() - began)
        if self.optimizer is not None:
            self.optimizer.step()
        self.network.zero_grad()

    def median(self, *, warm_up: int) -> float:
        """Seconds a batch, the first `warm_up` batches left out."""
        return statistics.median(self.seconds[warm_up:])
