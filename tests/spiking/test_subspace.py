from typing import Any

import pytest
import torch

from pipeline.spiking.subspace import (
    SecondMoments,
    SpikingMoments,
    Subspace,
    quantized_response,
)

CPU = torch.device("cpu")
LEARNING = {"rate": 0.01, "momentum": 0.9, "iterations": 5}


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def grown(size: int, *counts: int, dtype: torch.dtype = torch.float64) -> Subspace:
    subspace = Subspace(size, dtype=dtype, device=CPU)
    for index, count in enumerate(counts):
        subspace.grow(count, key=index)
    return subspace


def moments_from(
    subspace: Subspace, *parts: torch.Tensor, steps: int | None = None, mean=lambda sums: sums
) -> Any:
    """Of a batch that comes in parts; with `steps`, of spiking lateral neurons."""
    moments = SecondMoments(subspace) if steps is None else SpikingMoments(subspace, steps=steps)
    for x_NC in parts:
        moments.add(x_NC)
    moments.average(mean)
    return moments


def learn(subspace: Subspace, x_NC: torch.Tensor, **changes: float) -> None:
    options: Any = {**LEARNING, **changes}
    subspace.learn(moments_from(subspace, x_NC), **options)


def away_from_identity(rows: torch.Tensor) -> float:
    return (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).abs().max().item()


def gram_schmidt(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    done = list(others)
    for row in rows:
        for each in done:
            row = row - (row @ each) * each
        done.append(row / row.norm())
    return torch.stack(done[len(others) :])


def by_hand(old, new, velocity, x_NC, *, rate, momentum, iterations):
    """The published rule, sample by sample on all rows, of which the old ones are put back."""
    rows = torch.cat([old, new])
    for _ in range(iterations):
        change = torch.zeros_like(rows)
        for x in x_NC:
            y = rows @ x
            change += torch.outer(y, x - rows.T @ y) / len(x_NC)
        velocity = momentum * velocity + (1 - momentum) * change.clamp(-10, 10)[len(old) :]
        rows = torch.cat([old, rows[len(old) :] + rate * velocity])
    return rows[len(old) :], velocity


@pytest.mark.parametrize("scale", [1.0, 30.0])  # at 30 changes are clipped
@pytest.mark.parametrize("counts", [(4,), (3, 4), (2, 0)])
def test_learning_is_the_published_rule_sample_by_sample(counts, scale):
    subspace = grown(9, *counts)
    old, new, velocity = subspace.old.clone(), subspace.new.clone(), subspace.velocity.clone()
    for seed in range(3):
        x_NC = scale * double(20, 9, seed=seed)
        new, velocity = by_hand(old, new, velocity, x_NC, **LEARNING)
        new = gram_schmidt(new, old) if len(new) else new
        learn(subspace, x_NC)
        assert torch.allclose(subspace.velocity, velocity, atol=1e-11)
        assert torch.allclose(subspace.new, new, atol=1e-11)
    assert torch.equal(subspace.old, old)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_rows_are_orthonormal_after_300_batches_whatever_the_inputs(scale):
    subspace = grown(40, 10, 8)
    spectrum = scale * 0.7 ** torch.arange(40, dtype=torch.float64)
    for seed in range(300):
        learn(subspace, double(64, 40, seed=seed) * spectrum)
        assert away_from_identity(subspace.rows) < 1e-12
    before = subspace.old.clone()
    subspace.grow(5, key=9)
    assert away_from_identity(subspace.rows) < 1e-14
    assert torch.equal(subspace.old[:10], before) and len(subspace.old) == 18


def test_rows_find_the_principal_directions_and_new_ones_what_is_left():
    spectrum = torch.tensor([5.0, 4.0, 3.0, 2.0, 0.3, 0.2, 0.1], dtype=torch.float64)
    subspace = grown(7, 2)
    for task in range(2):
        for seed in range(400):
            learn(subspace, double(256, 7, seed=seed) * spectrum)
        kept = (subspace.rows * spectrum).square().sum() / spectrum.square().sum()
        best = spectrum[: 2 * (task + 1)].square().sum() / spectrum.square().sum()
        assert 0.99 * best < kept <= best + 1e-12
        subspace.grow(2, key=1 + task)


def test_projection_leaves_nothing_in_the_span_of_old_rows():
    subspace, g = grown(18, 7, 3), double(4, 2, 3, 3, seed=3)
    basis = torch.linalg.qr(subspace.old.T)[0]
    expected = g.flatten(1) @ (torch.eye(18, dtype=torch.float64) - basis @ basis.T)
    assert torch.allclose(subspace.project(g).flatten(1), expected, atol=1e-14)
    assert torch.allclose(subspace.project(subspace.project(g)), subspace.project(g), atol=1e-14)


def test_single_precision_holds_what_it_can():
    subspace = grown(800, 200, 70, dtype=torch.float32)
    for seed in range(3):
        learn(subspace, double(64, 800, seed=seed).float())
        assert subspace.new.dtype == torch.float32 and away_from_identity(subspace.rows) < 2e-6
    subspace.grow(70, key=2)
    g = double(10, 800).float()
    assert (subspace.project(g) @ subspace.old.T).abs().max() < 2e-6 * g.norm(dim=1).max()


@pytest.mark.parametrize("steps", [None, 40])
def test_moments_do_not_depend_on_how_a_batch_is_cut(steps):
    subspace, x_NC = grown(9, 3, 4), double(24, 9)
    one, other = (moments_from(subspace, *x_NC.split(size), steps=steps) for size in (24, 5))
    sent: list[torch.Tensor] = []
    moments_from(subspace, x_NC[:12], steps=steps, mean=lambda sums: sent.append(sums) or sums)
    of_two_ranks = moments_from(
        subspace, x_NC[12:], steps=steps, mean=lambda sums: (sent.pop(0) + sums) / 2
    )
    for each in (other, of_two_ranks):
        assert torch.allclose(
            each.hebbian_change(subspace), one.hebbian_change(subspace), atol=1e-14
        )
        assert torch.allclose(each.energy(subspace), one.energy(subspace), atol=1e-14)


def test_energy_is_what_the_rows_keep():
    subspace, x_NC = grown(9, 3, 4), double(24, 9)
    expected = (x_NC @ subspace.rows.T).square().sum() / x_NC.square().sum()
    for steps in (None, 10**9):
        energy = moments_from(subspace, x_NC, steps=steps).energy(subspace)
        assert torch.allclose(energy, expected, atol=1e-8)
    assert subspace.free_directions == 2


def test_spikes_of_lateral_neurons():
    y = torch.tensor([0.24, 0.26, -0.26, 19.9, 20.4, -1000.0, 0.0], dtype=torch.float64)
    assert quantized_response(y, 40).tolist() == [0.0, 0.5, -0.5, 20.0, 20.0, -20.0, 0.0]
    subspace, x_NC = grown(9, 3, 4), 2 * double(24, 9)
    exact, coarse, fine = (
        moments_from(subspace, x_NC, steps=steps).hebbian_change(subspace)
        for steps in (None, 40, 10**9)
    )
    y_NK = (x_NC @ subspace.rows.T / 0.5).round() * 0.5
    assert torch.allclose(coarse, (y_NK.T @ (x_NC - y_NK @ subspace.rows) / 24)[3:], atol=1e-14)
    assert torch.allclose(fine, exact, atol=1e-7)
    assert not torch.allclose(coarse, exact, atol=1e-2)


def test_rows_are_drawn_from_the_key_alone():
    states = torch.get_rng_state()
    one, same, other = (Subspace(9, dtype=torch.float64, device=CPU) for _ in range(3))
    for subspace, key in ((one, 1), (same, 1), (other, 2**63 + 2)):
        subspace.grow(3, key=key)
    assert torch.equal(one.new, same.new) and not torch.allclose(one.new, other.new, atol=0.1)
    assert torch.equal(torch.get_rng_state(), states)


def test_a_checkpoint_brings_its_rows():
    before, fresh = grown(9, 3, 4), grown(9, 3)
    learn(before, double(20, 9))
    fresh.load_state_dict(before.state_dict())
    for _ in range(2):
        state = before.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
        for subspace in (before, fresh):
            learn(subspace, double(20, 9, seed=1))


@pytest.mark.parametrize("steps", [None, 40])
def test_of_silent_inputs_all_is_kept(steps):
    subspace = grown(6, 2)
    silent = moments_from(subspace, torch.zeros(4, 6, dtype=torch.float64), steps=steps)
    assert silent.energy(subspace).item() == 1


# ------------------------------------------------------------------------------------------ budget
