"""The carry-over experiment: a replay is exact, its gradient is SLTT's, and its figures are those
of logits by hand.
"""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import carryover
from benchmarks.carryover import Moments, carried_over, means, record, replaying, shuffled
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.launch.prepare import write_job
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF, named_neurons
from pipeline.spiking.state import fresh_state
from pipeline.train.backend.collectives import Ranks
from pipeline.train.evaluation import evaluate, evaluation_batches
from pipeline.train.objective import CrossEntropy
from tests.helpers.rule_networks import (
    batch,
    cross_entropy,
    difference,
    gradients,
    lif_network,
    spikes_of,
)
from tests.helpers.small import make_run, small_recipe, train_inline

KINDS = ["real", "zero", "shuffled", "gaussian"]
DATA = Synthetic(samples=8, val_samples=41, shape=(1, 2, 2), noise=1.0)


@pytest.mark.parametrize(
    "neuron",
    [
        {},
        {"decay": 0.3, "reset": "zero", "scale_input": True},
        {"decay": 0.7, "reset_gradient": "kept", "threshold": 0.6, "subtract": 0.8},
    ],
    ids=str,
)
def test_a_replay_fires_the_same_spikes_and_its_gradient_is_that_of_sltt(neuron: dict) -> None:
    (x_TBC, target_B), model = batch(4), lif_network(**neuron)
    loss_fn = cross_entropy(target_B)
    by_sltt, by_bptt = (gradients(rule, model, x_TBC, loss_fn) for rule in (SLTT(), BPTT()))
    spikes = spikes_of(model)
    logits_TBK, membranes = record(model, x_TBC)
    model.zero_grad()
    with replaying(model, membranes), fresh_state(model):
        again_TBK = model(x_TBC)
        torch.stack([loss_fn(logits_BK) for logits_BK in again_TBK]).mean().backward()
    assert torch.equal(logits_TBK, again_TBK)
    assert all(torch.equal(run, replayed) for run, replayed in spikes.values())
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert difference(found, by_sltt) < 1e-12 < 1e-4 < difference(found, by_bptt)
    assert all(neuron.custom_forward is None for _, neuron in named_neurons(model))


def test_what_one_neuron_carries_over() -> None:
    """Current 0.6 at decay 0.5: u = 0.6, 0.9, 1.05, which fires, 0.625."""
    s_TBC, membranes = record(LIF(0.5), torch.full((4, 1, 1), 0.6, dtype=torch.float64))
    assert s_TBC.flatten().tolist() == [0, 0, 1, 0]
    assert torch.stack(membranes[""]).flatten().tolist() == pytest.approx([0, 0.6, 0.9, 0.05])


def test_a_gaussian_has_the_moments_of_each_channel_and_step() -> None:
    v_BCN = torch.randn(400, 2, 6) * torch.tensor([[1.0], [2.0]]) + torch.tensor([[10.0], [11.0]])
    moments = Moments()
    moments.add({"n": [v_BCN[:100]]})
    moments.add({"n": [v_BCN[99:]]})
    mean_C, deviation_C = moments.of("n", 0)
    kept_CN = v_BCN[:-1].double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(
        (mean_C, deviation_C), (kept_CN.mean(1), kept_CN.std(1, correction=0))
    )
    (drawn,) = moments.drawn_like({"n": [v_BCN]}, lambda place, t: range(400))["n"]
    (one,) = moments.drawn_like({"n": [v_BCN[7:8]]}, lambda place, t: [7])["n"]
    assert torch.equal(one, drawn[7:8])
    drawn_CN = drawn.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(drawn_CN.mean(1), mean_C, rtol=0, atol=4 * 2 / 2400**0.5)
    torch.testing.assert_close(drawn_CN.std(1), deviation_C, rtol=4 / 4800**0.5, atol=0)


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.neuron = LIF()

    def forward(self, x_TBK: Tensor) -> Tensor:
        return x_TBK + 0 * self.neuron(x_TBK)


# Right and right; wrong and right, with the mean right; wrong and right, with the mean wrong. The
# fourth is a donor.
BY_HAND_BTK = torch.tensor(
    [[[2.0, 0], [1, 0]], [[0, 1], [2, 0]], [[0, 3], [1, 0]], [[0, 9], [0, 9]]]
)


def test_figures_and_errors_of_logits_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carryover, "to_time_first", lambda x_BTK, steps: x_BTK.movedim(1, 0))
    batches = [(BY_HAND_BTK, torch.tensor([0, 0, 0, 1]), torch.tensor([5, 3, 4, 0]))]
    samples = carried_over(Fixed(), batches, steps=(2,))
    alone = means(samples).loc[2, "real"]
    by_group = means(samples, ["", "", "", "cup", "jug", "jug"]).loc[2, "real"]
    assert alone[["one", "ensemble", "gap"]].tolist() == pytest.approx([2 / 3, 2 / 3, 0])
    assert alone["disagree"] == alone["same class"] == pytest.approx(2 / 3)
    loss = lambda *margins: sum(
        torch.nn.functional.softplus(-torch.tensor(each)).item() for each in margins
    )
    assert alone["loss of one"] == pytest.approx(loss(2.0, -1.0, -3.0, 1.0, 2.0, 1.0) / 6)
    assert alone["loss of ensemble"] == pytest.approx(loss(1.5, 0.5, -1.0) / 3)
    assert alone["gap ±"] == pytest.approx(0.5 / 3**0.5)  # of the samples: 0, 1/2, -1/2
    # Residuals of the hits 1, 1, 0 from 2/3: those of the first and third, which are one group, sum
    # to -1/3.
    assert by_group["ensemble ±"] == pytest.approx((2 * ((1 / 3) ** 2 + (1 / 3) ** 2)) ** 0.5 / 3)


@pytest.mark.parametrize("size", [2, 7, 16, 41, 64])
def test_each_sample_is_tested_once_and_is_a_donor_once(size: int) -> None:
    pairs, whole = (
        [
            pair
            for *_, index_B in shuffled(DATA, size=each, seed=0)
            for pair in itertools.pairwise(index_B.tolist())
        ]
        for each in (size, 64)
    )
    tested, donors = zip(*pairs, strict=True)
    assert sorted(tested) == sorted(donors) == list(range(41)) and pairs == whole
    assert all(sample != donor for sample, donor in pairs)


def test_the_table_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_recipe(stop_after=4)
    write_job(make_run(tmp_path / "run", recipe))
    assert train_inline(tmp_path / "run", recipe) is not None
    found = []
    monkeypatch.setattr(carryover, "means", lambda *given: found.append(means(*given)) or found[-1])
    monkeypatch.setattr(
        "sys.argv", ["carryover", str(tmp_path / "run"), "--steps", "1,3", "--batch", "8"]
    )
    carryover.main()
    (table,) = found
    assert list(table.index) == [(T, kind) for T in (1, 3) for kind in KINDS]
    assert (table.loc[1] == table.loc[1, "real"]).all(
        axis=None
    )  # the first step has nothing to carry over
    assert table.loc[3, "zero"]["disagree"] == table.loc[3, "zero"]["gap"] == 0
    assert table.loc[3, "zero"]["ensemble"] == table.loc[1, "zero"]["ensemble"]
    assert (table["loss of ensemble"] <= table["loss of one"] + 1e-12).all()  # Jensen
    assert len(table["loss of one"].loc[3].round(6).unique()) == 4
    network = carryover.load_run(tmp_path / "run", which="last")
    plain, *_ = evaluate(
        network,
        evaluation_batches(recipe.data.build().val(micro_batch=7), 3, Ranks()),
        CrossEntropy(),
    )
    assert table.loc[3, "real"]["ensemble"] == pytest.approx(plain.top1)
    assert (tmp_path / "run" / "carryover.csv").exists() and "gaussian" in capsys.readouterr().out
