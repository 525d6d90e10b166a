"""The probe against scikit-learn, its optimality condition, and the order of its samples."""

# N samples, D features, K classes

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pipeline.models.teachers import probe as module
from pipeline.models.teachers.probe import Probe
from tests.helpers.rule_networks import refusals


def data(samples: int = 120, features: int = 7, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    target_N = torch.randint(classes, (samples,), generator=generator)
    centres = torch.randn(classes, features, generator=generator)
    scale = torch.logspace(-3, 2, features)  # standardised away
    return (
        centres[target_N] + 1.5 * torch.randn(samples, features, generator=generator)
    ) * scale + 5 * scale, target_N


def test_it_is_the_minimum_that_scikit_learn_finds() -> None:
    x_ND, target_N = data()
    head = Probe(l2=0.01).fit(x_ND, target_N, 4)
    z_ND = (x_ND.double() - x_ND.double().mean(0)) / x_ND.double().std(0, correction=0)
    peer = LogisticRegression(C=1 / (0.01 * len(z_ND)), tol=1e-10, max_iter=10_000).fit(
        z_ND.numpy(), target_N.numpy()
    )
    wanted = peer.predict_proba(z_ND.numpy())
    assert np.abs(head(x_ND).softmax(-1).numpy() - wanted).max() < 1e-4


def test_neither_the_order_nor_a_generator_decides_it() -> None:
    x_ND, target_N = data()
    order = torch.randperm(len(x_ND))
    before = torch.get_rng_state()
    one = Probe().fit(x_ND, target_N, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.weight, Probe().fit(x_ND, target_N, 4).weight)
    assert torch.allclose(one(x_ND), Probe().fit(x_ND[order], target_N[order], 4)(x_ND), atol=1e-2)


def test_a_feature_that_never_moves_and_a_class_that_never_comes_do_no_harm() -> None:
    x_ND, target_N = data()
    x_ND[:, 2] = 3.0
    logits_NK = Probe().fit(x_ND, target_N, 6)(x_ND)
    assert logits_NK.isfinite().all() and logits_NK.argmax(-1).max() < 4


def test_a_fit_that_ends_early_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ITERATIONS", 2)
    with pytest.raises(
        ValueError,
        match=r"Probe: the fit must reach a gradient of 1e-05 within 2 iterations; .* l2=0\.001",
    ):
        Probe().fit(*data(), 4)


test_refuses = refusals(
    [({"l2": 0.0}, "l2 must be"), ({"views": 0}, "views must"), ({"seed": -1}, "seed")], Probe
)
