"""The causal test: what must hold exactly, on a network that was trained for a moment, and its figures from logits by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pipeline import ensemble
from pipeline.data.base import Data
from pipeline.data.synthetic import Synthetic
from pipeline.ensemble import KINDS, CausalTest, Ensemble, Shuffled, causal_test
from pipeline.evaluate import evaluate, inputs
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.objective import CrossEntropy
from pipeline.rules.sltt import SLTT
from pipeline.spiking.carryover import Gaussian, record
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.rate import WeightedRates
from pipeline.spiking.synapse import Linear

CPU = torch.device("cpu")
DATA = Synthetic(samples=64, val_samples=41, shape=(1, 8, 8), noise=1.0)
STEPS = (1, 2, 4)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Trained for 16 batches at T = 2."""
    torch.manual_seed(0)
    made = nf_resnet18_small(10, in_channels=1, width=4, blocks=(1, 1))
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9)
    rule = SLTT()
    rule.attach(made)
    loader = DATA.train(seed=0, batch_size=16, micro_batch=16)
    for epoch in range(4):
        with loader.epoch(epoch) as batches:
            for batch in batches:
                for objective in rule.objectives(made, repeat(batch.x, 2), CrossEntropy()(batch.target)):
                    assert objective.backward is not None
                    objective.backward.backward()
                optimizer.step()
                optimizer.zero_grad()
    rule.release()
    return made


def answers(network: nn.Module, *, micro_batch: int = 16, **choices) -> CausalTest:
    return causal_test(network, shuffled(DATA, micro_batch, steps=max(STEPS)), steps=STEPS, **choices)


def shuffled(data: Data, size: int = 16, *, steps: int = 1, seed: int = 0, **choices) -> Shuffled:
    return Shuffled(data=data, micro_batch=size, time_steps=steps, device=CPU, seed=seed, **choices)


@pytest.fixture(scope="module")
def found(network: nn.Module) -> CausalTest:
    return answers(network)


def of(found: CausalTest, kind: str) -> dict[int, Ensemble]:
    return {each.steps: each for each in found.ensembles if each.carry_over == kind}


def test_it_answers_for_every_sample_step_and_carry_over(found: CausalTest) -> None:
    assert [(each.steps, each.carry_over) for each in found.ensembles] == [(T, kind) for T in STEPS for kind in KINDS]
    assert found.samples == found.groups == 41
    assert found.bytes > 0


def test_the_first_step_has_nothing_to_carry_over(found: CausalTest) -> None:
    first = [replace(each, carry_over="real") for each in found.ensembles if each.steps == 1]
    assert all(each == first[0] for each in first)
    assert first[0].gap.value == first[0].disagreement.value == first[0].below_real.value == 0
    assert first[0].single == first[0].ensemble


def test_without_carry_over_all_steps_are_the_first(found: CausalTest) -> None:
    for T, each in of(found, "zero").items():
        assert each.by_step == (each.by_step[0],) * T
        assert each.gap.value == each.gap.error == each.disagreement.value == 0
        assert each.ensemble == of(found, "zero")[1].ensemble
        assert each.ensemble_loss.value == pytest.approx(each.single_loss.value, abs=1e-12)


def test_the_loss_of_the_mean_is_at_most_the_mean_loss(found: CausalTest) -> None:
    """Jensen: cross-entropy is convex in the logits; strictly so where steps differ."""
    for each in found.ensembles:
        assert each.ensemble_loss.value <= each.single_loss.value + 1e-12
    assert of(found, "real")[4].ensemble_loss.value < of(found, "real")[4].single_loss.value - 1e-4
    assert of(found, "real")[4].disagreement.value > 0


@pytest.mark.parametrize("steps", STEPS)
def test_the_real_one_is_what_evaluate_finds(network: nn.Module, found: CausalTest, steps: int) -> None:
    plain, *_ = evaluate(network, inputs(DATA.val(micro_batch=7), steps, CPU), CrossEntropy())
    real = of(found, "real")[steps]
    assert real.ensemble.value == pytest.approx(plain.top1, abs=1e-12)
    assert real.single_loss.value == pytest.approx(plain.loss, abs=1e-5)


def test_the_four_are_not_the_same(found: CausalTest) -> None:
    losses = [round(of(found, kind)[4].single_loss.value, 6) for kind in KINDS]
    assert len(set(losses)) == 4


def test_draws_depend_on_the_sample_and_the_seed_alone(network: nn.Module, found: CausalTest) -> None:
    again, other_batches, other_seed = answers(network), answers(network, micro_batch=64), answers(network, seed=1)
    assert again == found
    first, second, third = (of(each, "gaussian")[4].single_loss.value for each in (found, other_seed, other_batches))
    assert abs(first - second) > 1e-6
    assert third == pytest.approx(first, abs=1e-6)


class Fixed(nn.Module):
    """Logits that the input is."""

    def __init__(self) -> None:
        super().__init__()
        self.neuron = LIF()

    def forward(self, x_TBK: Tensor) -> Tensor:
        return x_TBK + 0 * self.neuron(x_TBK)


# Right and right; wrong and right, with the mean right; wrong and right, with the mean wrong. The fourth is a donor alone.
BY_HAND_TBK = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [0.0, 9.0]], [[1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 9.0]]])


def test_figures_of_logits_by_hand() -> None:
    found = causal_test(Fixed(), [(BY_HAND_TBK, torch.tensor([0, 0, 0, 1]), torch.arange(4))], steps=(2,))
    real = found.ensembles[0]
    assert real.by_step == pytest.approx((1 / 3, 1.0))
    assert real.single.value == pytest.approx(2 / 3)
    assert real.ensemble.value == pytest.approx(2 / 3)
    assert real.gap.value == pytest.approx(0)  # of the samples: 0, 1/2, -1/2
    assert real.gap.error == pytest.approx(0.5 / 3**0.5)
    assert real.disagreement.value == pytest.approx(2 / 3)
    softplus = lambda *margins: [torch.nn.functional.softplus(-torch.tensor(margin)).item() for margin in margins]
    assert real.single_loss.value == pytest.approx(sum(softplus(2.0, -1.0, -3.0, 1.0, 2.0, 1.0)) / 6)
    assert real.ensemble_loss.value == pytest.approx(sum(softplus(1.5, 0.5, -1.0)) / 3)
    assert found.same_class == pytest.approx(2 / 3)


def test_errors_over_groups_by_hand() -> None:
    """Residuals of the ensemble's hits 1, 1, 0 from 2/3; of the first and the third, which are one group, they cancel to -1/3."""
    batches = [(BY_HAND_TBK, torch.tensor([0, 0, 0, 1]), torch.tensor([5, 3, 4, 0]))]
    groups = ["", "", "", "cup", "jug", "jug"]
    found = causal_test(Fixed(), batches, steps=(2,), groups=groups)
    real = found.ensembles[0]
    assert found.groups == 2 and found.samples == 3
    assert real.ensemble.error == pytest.approx((2 * ((1 / 3) ** 2 + (1 / 3) ** 2)) ** 0.5 / 3)
    assert real.gap.error == pytest.approx((2 * (0.5**2 + 0.5**2)) ** 0.5 / 3)  # 0 - 1/2 and 1/2


def test_scenes_that_are_copies_leave_the_error_of_their_objects() -> None:
    """Four times the same samples: taken to be drawn by themselves, the error is half of what it is over groups."""
    torch.manual_seed(0)
    logits_TBK, target_B = torch.randn(2, 30, 3), torch.randint(3, (30,))
    one = [(_and_one_more(logits_TBK, 1), _and_one_more(target_B), _and_one_more(torch.arange(30)))]
    four = [(_and_one_more(logits_TBK.repeat(1, 4, 1), 1), _and_one_more(target_B.repeat(4)), _and_one_more(torch.arange(120)))]
    groups = [str(row % 30) for row in range(120)]
    once, by_group, alone = (
        causal_test(Fixed(), batches, groups=by, steps=(2,)) for batches, by in ((one, None), (four, groups), (four, None))
    )
    for each, grouped, naive in zip(once.ensembles, by_group.ensembles, alone.ensembles, strict=True):
        for name in ("single", "ensemble", "gap", "disagreement", "single_loss"):
            error = getattr(each, name).error
            assert getattr(grouped, name).error == pytest.approx(error)
            assert getattr(naive, name).error == pytest.approx(error / 2 * (29 / 119 * 4) ** 0.5)
    assert by_group.groups == 30 and alone.groups == 120


def _and_one_more(x: Tensor, dim: int = 0) -> Tensor:
    """The first once more, behind the last."""
    return torch.cat([x, x.narrow(dim, 0, 1)], dim)


@pytest.mark.parametrize(("samples", "size"), [(41, 16), (33, 16), (32, 17), (3, 2), (2, 64), (8, 2)])
@pytest.mark.parametrize("held_bytes", [1, 16 * 10, 2**31])
def test_each_sample_is_tested_once_and_a_donor_once(samples: int, size: int, held_bytes: int) -> None:
    """Also where the memory holds 10 samples of 16 bytes, or not one, and then parts are as small as can be."""
    data = Synthetic(samples=8, val_samples=samples, shape=(1, 2, 2), noise=1.0)
    whole = torch.cat([batch.x for batch in _batches(data)])
    place = {tuple(x.flatten().tolist()): index for index, x in enumerate(whole)}
    donor_of = {}
    for x_TB, target_B, index_B in shuffled(data, size, held_bytes=held_bytes):
        places = [place[tuple(x.flatten().tolist())] for x in x_TB[0]]
        assert 2 <= len(places) <= size
        assert index_B.tolist() == places and target_B.tolist() == [index % 10 for index in places]
        for sample, donor in itertools.pairwise(places):
            assert sample != donor and sample not in donor_of
            donor_of[sample] = donor
    assert sorted(donor_of) == sorted(donor_of.values()) == list(range(samples))
    assert len(_part_of(0, donor_of)) <= max(3, min(samples, held_bytes // 16))


def _part_of(sample: int, donor_of: dict[int, int]) -> list[int]:
    """A sample, its donor, that one's donor, and so on."""
    part = [sample]
    while (donor := donor_of[part[-1]]) != sample:
        part.append(donor)
    return part


def test_donors_depend_on_the_seed_and_not_on_the_batch_size() -> None:
    assert pairs(shuffled(SCENES, 8)) == pairs(shuffled(SCENES, 64)) != pairs(shuffled(SCENES, 8, seed=1))


SCENES = Synthetic(samples=13, val_samples=1040, classes=13, shape=(1, 2, 2))
"""As scenes of stamps lie in their file: i of class i % 13, where half the file away, at i + 520, is the same class."""


@pytest.mark.parametrize("held_bytes", [16 * 100, 2**31])
def test_a_donor_s_class_says_nothing_of_the_sample(held_bytes: int) -> None:
    donor_of = pairs(shuffled(SCENES, 32, held_bytes=held_bytes))
    table = torch.zeros(13, 13)
    for sample, donor in donor_of.items():
        table[sample % 13, donor % 13] += 1
    expected = 1040 / 13**2
    assert abs(table.trace() / 1040 - 1 / 13) < 4 * (12 / 13**2 / 1040) ** 0.5
    chi_square, freedom = float(((table - expected) ** 2 / expected).sum()), 12**2
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    assert len({donor - sample for sample, donor in donor_of.items()}) > 500  # nor is it so far away in the file


def test_the_share_of_donors_of_the_same_class_is_reported() -> None:
    donor_of = pairs(shuffled(SCENES, 64))
    found = causal_test(Flat(), shuffled(SCENES, 64), steps=(1,))
    assert found.same_class == sum(sample % 13 == donor % 13 for sample, donor in donor_of.items()) / 1040
    assert 0 < found.same_class < 2 / 13


def pairs(batches: Shuffled) -> dict[int, int]:
    """The donor of each sample."""
    return {sample: donor for _, _, index_B in batches for sample, donor in itertools.pairwise(index_B.tolist())}


class Flat(nn.Module):
    """Pixels to as many logits."""

    def __init__(self) -> None:
        super().__init__()
        self.neuron = LIF()

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.neuron(x_TBCHW).flatten(2).repeat(1, 1, 4)[..., :13]


def _batches(data: Synthetic):
    with data.val(micro_batch=8).epoch(0) as batches:
        yield from batches


def test_moments_are_those_of_the_samples_that_are_tested(monkeypatch: pytest.MonkeyPatch, network: nn.Module) -> None:
    """Each sample once, none a second time as a donor: the noise has the mean and variance of what it replaces."""
    made: list[Gaussian] = []
    monkeypatch.setattr(ensemble, "Gaussian", lambda examples: made.append(Gaussian(examples)) or made[-1])
    answers(network)
    whole = torch.cat([batch.x for batch in _batches(DATA)])
    _, carry_over = record(network.eval(), repeat(whole, max(STEPS)))
    (gaussian,) = made
    assert gaussian.samples == 41
    for (name, t), (mean_C, deviation_C) in gaussian.moments.items():
        v_CN = carry_over.membranes[name][t].double().movedim(1, 0).flatten(1)
        torch.testing.assert_close(mean_C, v_CN.mean(1), rtol=0, atol=1e-6)
        torch.testing.assert_close(deviation_C, v_CN.std(1, correction=0), rtol=0, atol=1e-6)


def test_refuses_what_it_cannot_answer(network: nn.Module) -> None:
    x_TB, target_B, index_B = torch.randn(2, 3, 1, 8, 8), torch.tensor([0, 1, 2]), torch.arange(3)
    whole = [(x_TB, target_B, index_B)]
    with pytest.raises(ValueError, match=r"steps must be numbers of time steps, from 1; got \[0, 2\]"):
        causal_test(network, [], steps=(2, 0))
    with pytest.raises(ValueError, match="needs 2 samples and 2 steps; got 1 and 2"):
        causal_test(network, [(x_TB[:, :1], target_B[:1], index_B[:1])], steps=(2,))
    with pytest.raises(ValueError, match="needs 2 samples and 2 steps; got 3 and 1"):
        causal_test(network, [(x_TB[:1], target_B, index_B)], steps=(2,))
    with pytest.raises(ValueError, match="moments need examples"):
        causal_test(network, [], steps=(2,))
    with pytest.raises(ValueError, match="donor must be another sample; got sample 7 for itself"):
        causal_test(network, [(x_TB, target_B, torch.tensor([1, 7, 7]))], steps=(2,))
    with pytest.raises(ValueError, match="must be the same each time they are gone through; got 2 samples, then 0"):
        causal_test(network, iter(whole), steps=(2,))
    with pytest.raises(ValueError, match="must be of 2 groups or more; got 2 samples of one"):
        causal_test(network, whole, steps=(2,), groups=["cup", "cup", "jug"])
    with pytest.raises(ValueError, match="WeightedRates counts back from the last; got it at 1"):
        causal_test(nn.Sequential(Linear(2, 2), WeightedRates(0.5)), [])
    alone = Synthetic(samples=8, val_samples=1, shape=(1, 8, 8))
    with pytest.raises(ValueError, match="donor must be another sample; got sample 0 for itself"):
        causal_test(network, shuffled(alone, steps=2), steps=(2,))
