"""The causal test: what must hold exactly, on a network that was trained for a moment, and its figures from logits by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pipeline.data.synthetic import Synthetic
from pipeline.ensemble import KINDS, CausalTest, Ensemble, causal_test, from_both_halves, training_examples
from pipeline.evaluate import evaluate, inputs
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.objective import CrossEntropy
from pipeline.rules.sltt import SLTT
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
    examples = training_examples(DATA, 16, max(STEPS), CPU, seed=0)
    return causal_test(network, from_both_halves(DATA, micro_batch, max(STEPS), CPU), examples, steps=STEPS, **choices)


@pytest.fixture(scope="module")
def found(network: nn.Module) -> CausalTest:
    return answers(network)


def of(found: CausalTest, kind: str) -> dict[int, Ensemble]:
    return {each.steps: each for each in found.ensembles if each.carry_over == kind}


def test_it_answers_for_every_sample_step_and_carry_over(found: CausalTest) -> None:
    assert [(each.steps, each.carry_over) for each in found.ensembles] == [(T, kind) for T in STEPS for kind in KINDS]
    assert found.samples == 41 and found.examples == 64
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
    plain, _ = evaluate(network, inputs(DATA.val(micro_batch=7), steps, CPU), CrossEntropy())
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


def test_figures_of_logits_by_hand() -> None:
    """Three samples, two steps: right and right; wrong and right, with the mean right; wrong and right, with the mean wrong."""
    x_TBK = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]], [[1.0, 0.0], [2.0, 0.0], [1.0, 0.0]]])
    target_B = torch.tensor([0, 0, 0])
    found = causal_test(Fixed(), [(x_TBK, target_B, torch.arange(3))], [x_TBK], steps=(2,))
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
    assert found.same_class == 1


@pytest.mark.parametrize(("samples", "size"), [(41, 16), (33, 16), (32, 16), (3, 2), (2, 64), (8, 2)])
def test_each_sample_comes_once_with_its_donor_in_the_other_half(samples: int, size: int) -> None:
    data = Synthetic(samples=8, val_samples=samples, shape=(1, 2, 2), noise=1.0)
    whole = torch.cat([batch.x for batch in _batches(data)])
    place = {tuple(x.flatten().tolist()): index for index, x in enumerate(whole)}
    seen = []
    for x_TB, target_B, index_B in from_both_halves(data, size, 1, CPU):
        places = [place[tuple(x.flatten().tolist())] for x in x_TB[0]]
        assert len(places) >= 2 and index_B.tolist() == places and target_B.tolist() == [index % 10 for index in places]
        donors = torch.arange(len(places)).roll(len(places) // 2)
        same_half = [
            (index < samples // 2) == (places[donor] < samples // 2) for index, donor in zip(places, donors, strict=True)
        ]
        assert sum(same_half) <= 2  # where the halves are not equally long
        assert all(int(donor) != b for b, donor in enumerate(donors))
        seen += places
    assert sorted(seen) == list(range(samples))


def _batches(data: Synthetic):
    with data.val(micro_batch=8).epoch(0) as batches:
        yield from batches


def test_refuses_what_it_cannot_answer(network: nn.Module) -> None:
    x_TB, target_B, index_B = torch.randn(2, 3, 1, 8, 8), torch.tensor([0, 1, 2]), torch.arange(3)
    with pytest.raises(ValueError, match=r"steps must be numbers of time steps, from 1; got \[0, 2\]"):
        causal_test(network, [], [x_TB], steps=(2, 0))
    with pytest.raises(ValueError, match="needs 2 samples and 2 steps; got 1 and 2"):
        causal_test(network, [(x_TB[:, :1], target_B[:1], index_B[:1])], [x_TB], steps=(2,))
    with pytest.raises(ValueError, match="needs 2 samples and 2 steps; got 3 and 1"):
        causal_test(network, [(x_TB[:1], target_B, index_B)], [x_TB], steps=(2,))
    with pytest.raises(ValueError, match="needs at least one batch"):
        causal_test(network, [], [x_TB], steps=(2,))
    with pytest.raises(ValueError, match="moments need examples"):
        causal_test(network, [(x_TB, target_B, index_B)], [], steps=(2,))
    with pytest.raises(ValueError, match="WeightedRates counts back from the last; got it at 1"):
        causal_test(nn.Sequential(Linear(2, 2), WeightedRates(0.5)), [], [x_TB])
