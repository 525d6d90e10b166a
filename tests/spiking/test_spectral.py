import pytest
import torch
from torch import Tensor

from pipeline.spiking.spectral import spectral_norm


def exact(V: Tensor) -> float:
    return torch.linalg.matrix_norm(V.double().flatten(1), 2).item()


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(size)))[0]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


HARD = {
    "square": lambda: _random(400, 400),
    "wide": lambda: _random(96, 2304),
    "tall": lambda: _random(1152, 128),
    "uniform spectrum": lambda: orthogonal(200) @ torch.diag(torch.linspace(0, 1, 200)) @ orthogonal(200).T,
    "diagonal": lambda: torch.diag(torch.arange(400.0)),
    "orthogonal": lambda: orthogonal(200),
    "identity": lambda: torch.eye(200),
    "common direction": lambda: torch.ones(200, 200) + 0.01 * _random(200, 200),
    "no common direction": lambda: torch.eye(200) - torch.ones(200, 200) / 200,
    "rank 3": lambda: _random(200, 3) @ _random(3, 200),
    "rank 1": lambda: torch.outer(_random(30), _random(50)),
    "one by one": lambda: torch.full((1, 1), -2.0),
}


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("name", HARD)
def test_the_largest_singular_value(name, scale):
    V = HARD[name]() * scale
    found = spectral_norm(V).item() / exact(V)
    assert 1 - 1e-3 < found < 1 + 1e-5


def test_exact_for_small_matrices_and_so_is_its_gradient():
    V = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert spectral_norm(V).item() == pytest.approx(exact(V), rel=1e-14)
    assert torch.autograd.gradcheck(spectral_norm, (V,))


def test_a_pure_function_of_the_weight():
    V = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    assert torch.equal(spectral_norm(V), spectral_norm(V.clone()))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(spectral_norm(V), spectral_norm(V.clone())) and spectral_norm(V).dtype == torch.float32
