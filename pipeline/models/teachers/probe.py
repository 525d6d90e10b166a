"""Softmax regression on a frozen network's features: a head for the classes of another data set."""

# N samples, D features, K classes

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.core.checks import require

ITERATIONS = 2000
TOLERANCE = 1e-5  # the largest entry of the final gradient


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A linear head whose weights W and biases b minimise

        1/N sum_n CE(W z_n + b, y_n)  +  l2/2 |W|^2

    where z are the features, standardised to mean 0 and variance 1 over the N samples. L-BFGS in
    float64 finds the minimum, so the head does not depend on a learning rate. The standardisation
    is folded into W and b.

    Args:
        l2: above 0, so that the best W is unique, even for separable classes.
        views: number of augmented views of the training part for the fit; None: one per sample.
        seed: determines the order and augmentation of the views. It is not the run's seed, so every
            run of a study has the same teacher.

    Raises: ValueError for `l2` of 0 or below, `views` below 1 or a negative `seed`.
    """

    l2: float = 1e-3
    views: int | None = None
    seed: int = 0

    tiny: ClassVar[Mapping[str, Any]] = {"views": 64}

    def __post_init__(self) -> None:
        require(self.l2 > 0, f"Probe: l2 must be above 0; got {self.l2}")
        require(
            self.views is None or self.views >= 1,
            f"Probe: views must be 1 or more; got {self.views}",
        )
        require(self.seed >= 0, f"Probe: seed must not be negative; got {self.seed}")

    def fit(self, features_ND: Tensor, target_N: Tensor, classes: int) -> nn.Linear:
        """The head, in fp32.

        Raises: ValueError if the minimum is not reached.
        """
        x_ND, y_N = features_ND.double().cpu().numpy(), target_N.cpu().numpy()
        mean_D, std_D = x_ND.mean(0), x_ND.std(0)
        std_D[std_D == 0] = 1.0  # a constant feature has no effect
        z_ND = (x_ND - mean_D) / std_D
        shape = (classes, z_ND.shape[1])

        def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            w_KD, b_K = flat[:-classes].reshape(shape), flat[-classes:]
            logits_NK = z_ND @ w_KD.T + b_K
            logits_NK -= logits_NK.max(1, keepdims=True)
            q_NK = np.exp(logits_NK)
            sum_N = q_NK.sum(1)
            value = (
                np.mean(np.log(sum_N) - logits_NK[np.arange(len(y_N)), y_N])
                + self.l2 / 2 * np.square(w_KD).sum()
            )
            error_NK = q_NK / sum_N[:, None]
            error_NK[np.arange(len(y_N)), y_N] -= 1
            error_NK /= len(y_N)
            return float(value), np.concatenate(
                [(error_NK.T @ z_ND + self.l2 * w_KD).ravel(), error_NK.sum(0)]
            )

        from scipy.optimize import minimize  # scipy comes with the extra [train]

        minimum = minimize(
            loss,
            np.zeros(classes * (shape[1] + 1)),
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": ITERATIONS,
                "maxfun": 2 * ITERATIONS,
                "ftol": 0.0,
                "gtol": TOLERANCE / 10,
            },
        )
        max_gradient = float(np.abs(minimum.jac).max())
        require(
            max_gradient <= TOLERANCE,
            f"Probe: the fit must reach a gradient of {TOLERANCE} within {ITERATIONS} iterations;"
            f" got {max_gradient:.1e}; raise l2={self.l2}",
        )
        w_KD = minimum.x[:-classes].reshape(shape) / std_D
        # Created on the meta device, so that no random numbers are drawn.
        head = (
            nn.Linear(shape[1], classes, device="meta").to_empty(device="cpu").requires_grad_(False)
        )
        head.weight.copy_(torch.from_numpy(w_KD))
        head.bias.copy_(torch.from_numpy(minimum.x[-classes:] - w_KD @ mean_D))
        return head
