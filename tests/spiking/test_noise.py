"""Noise of a key: splitmix64 to the bit, the distributions, and rows that know nothing of one
another.
"""

import math

import pytest
import torch

from pipeline.core.random import INCREMENT, counter_hash, hash_on_device, signed
from pipeline.spiking.noise import _bits, noise
from tests.helpers.rule_networks import refusals

MASK = (1 << 64) - 1
KEYS = hash_on_device(7, torch.arange(64))


def test_bits_are_those_of_the_rules_hash():
    """counter_hash(c) is the mix of c + g, so number j of a key is counter_hash(key + j g)."""
    keys = [0, 5, MASK, 1 << 63]
    keys_B = torch.tensor(list(map(signed, keys)))
    for row, key in zip(_bits(keys_B, 5).tolist(), keys, strict=True):
        assert [bits & MASK for bits in row] == [
            counter_hash((key + j * INCREMENT) & MASK) for j in range(5)
        ]


def test_keys_are_the_rules_hashes():
    rows, layers = torch.tensor([0, 3, 2**40]), torch.tensor([[0], [5]])
    assert hash_on_device(7, 11, rows, layers).tolist() == [
        [signed(counter_hash(7, 11, row, layer)) for row in rows.tolist()] for layer in (0, 5)
    ]


@pytest.mark.parametrize(("distribution", "fourth"), [("gaussian", 3.0), ("rademacher", 1.0)])
def test_moments(distribution, fourth):
    z = noise(KEYS, 4001, distribution=distribution).double()
    samples = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(samples)
    assert abs(z.square().mean() - 1) < 4 * math.sqrt(2 / samples)
    assert abs(z.pow(4).mean() - fourth) < 4 * math.sqrt(96 / samples)
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 4 / math.sqrt(samples)
    assert abs((z[1:] * z[:-1]).mean()) < 4 / math.sqrt(samples)
    half = z.shape[1] // 2  # the two numbers of one Box-Muller pair stand so far apart
    assert abs((z[:, : half + 1] * z[:, half:]).mean()) < 4 / math.sqrt(samples / 2)


def test_a_gaussian_has_its_quantiles():
    z = noise(KEYS, 4000, distribution="gaussian").double().flatten()
    for point in (-2.0, -1.0, 0.0, 0.5, 1.5, 3.0):
        share, expected = (z < point).double().mean(), 0.5 * (1 + math.erf(point / math.sqrt(2)))
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / z.numel())


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("units", [1, 63, 64, 130])
def test_a_row_depends_on_its_key_alone(distribution, units):
    whole = noise(KEYS, units, distribution=distribution)
    assert whole.shape == (64, units) and whole.dtype == torch.float32
    for rows in ([3], [9, 3], list(range(64))[::-1]):
        assert torch.equal(noise(KEYS[rows], units, distribution=distribution), whole[rows])
    assert units < 63 or len({tuple(row) for row in whole.tolist()}) == 64


test_refuses = refusals(
    [
        (
            lambda: noise(KEYS, 3, distribution="uniform"),
            "noise: distribution must be 'gaussian' or 'rademacher'; got distribution='uniform'",
        )
    ]
)
