import itertools

import pytest
import torch
from torch import nn

from pipeline.core.random import counter_hash
from pipeline.rules.base import LossTerm, Rule, World, slices
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import is_static, repeat
from tests.helpers.rule_networks import (
    FEATURES,
    batch,
    cross_entropy,
    difference,
    gradients,
    lif_network,
)


def test_counter_hash_starts_as_splitmix64():
    # First outputs of the reference C code (prng.di.unimi.it/splitmix64.c) for the states 0 and
    # 1234567.
    assert counter_hash(0) == 0xE220A8397B1DCDAF
    assert counter_hash(1234567) == 6457827717110365317


def test_counter_hash_tells_counters_apart():
    words = list(itertools.product(range(8), repeat=3))
    assert len({counter_hash(*word) for word in words}) == len(words)
    bits = [counter_hash(0, step, 0) for step in range(4000)]
    for position in range(64):
        share = sum(word >> position & 1 for word in bits) / len(bits)
        assert 0.46 < share < 0.54  # 5 standard errors


def test_world_is_one_rank_by_default():
    statistic = torch.ones(2)
    assert World() == World(seed=0, rank=0, size=1) and World().mean(statistic) is statistic


def test_a_rule_does_not_own_the_network():
    rule, model = BPTT(), lif_network()
    rule.attach(model)
    assert not list(rule.parameters()) and not rule.state_dict() and len(list(rule.modules())) == 1


def test_refusals_come_at_once():
    rule, model = BPTT(), lif_network()
    x_TBC, target = batch(2)
    with pytest.raises(ValueError, match=r"BPTT: attach\(model\) comes before loss_terms"):
        rule.loss_terms(model, x_TBC, cross_entropy(target))
    with pytest.raises(
        ValueError, match=r"BPTT: over_time must be 'steps' or 'mean'; got over_time='sum'"
    ):
        rule.attach(model, over_time="sum")  # type: ignore[arg-type]
    rule.attach(model)
    with pytest.raises(
        ValueError, match=r"BPTT: the input must be time first, .* got shape \(5, 6\)"
    ):
        rule.loss_terms(model, x_TBC[0], cross_entropy(target))
    with pytest.raises(ValueError, match=r"BPTT: loss_terms needs the attached model"):
        rule.loss_terms(lif_network(), x_TBC, cross_entropy(target))


def test_a_wrapper_of_the_attached_model_will_do():
    rule, model = BPTT(), lif_network()
    rule.attach(model)
    assert (
        len(list(rule.loss_terms(nn.Sequential(model), batch(2)[0], cross_entropy(batch(2)[1]))))
        == 1
    )


@pytest.mark.parametrize("taken", ["whole", "part", "wrapper"])
def test_a_model_that_carries_a_rule_refuses_another(taken):
    model = lif_network()
    BPTT().attach({"whole": model, "part": model[1], "wrapper": nn.Sequential(model)}[taken])
    with pytest.raises(ValueError, match="BPTT: the model must carry no rule yet; got BPTT"):
        BPTT().attach(model)


class Steps(Rule):
    """Reports the step it was given."""

    memory = "constant"

    def _loss_terms(self, model, x_TB, loss_of, step, rows):
        yield LossTerm(
            backward=None, loss=torch.tensor(float(step)), logits=torch.tensor(list(rows))
        )


def test_step_counts_on_and_rows_count_from_zero():
    rule, model = Steps(), nn.Identity()
    rule.attach(model)
    x_TB = torch.zeros(1, 3, FEATURES)
    steps = [
        next(rule.loss_terms(model, x_TB, torch.sum, step=given)).loss.item()
        for given in (None, None, 7, None, 0, None)
    ]
    assert steps == [0, 1, 7, 8, 0, 1]
    assert next(rule.loss_terms(model, x_TB, torch.sum)).logits.tolist() == [0, 1, 2]
    assert next(rule.loss_terms(model, x_TB, torch.sum, rows=[4, 9, 2])).logits.tolist() == [
        4,
        9,
        2,
    ]


def test_slices_own_their_storage_and_a_still_image_stays_still():
    many_B = torch.randn(8, 2, 3)
    recording_TB, still_TB = torch.randn(5, 8, 2, 3)[:, :4], repeat(many_B[:4], 5)
    for x_TB in (recording_TB, still_TB):
        parts = list(slices(x_TB, 2))
        assert torch.equal(torch.cat(parts), x_TB) and [len(part) for part in parts] == [2, 2, 1]
        assert all(is_static(part) == is_static(x_TB) for part in parts)
        assert all(part.untyped_storage().nbytes() <= part.numel() * 4 for part in parts)
    assert len({part.data_ptr() for part in slices(still_TB, 1)}) == 1


@pytest.mark.parametrize(
    ("whole", "sliced", "over_time"),
    [
        *[
            (BPTT(), BPTT(chunk=chunk), over_time)
            for chunk in (1, 2, 5)
            for over_time in ("steps", "mean")
        ],
        *[(OTTT(), OTTT(chunk=chunk), "steps") for chunk in (3, 4, 6)],
        *[(SLTT(), SLTT(chunk=chunk), "steps") for chunk in (2, 4, 6)],
        *[
            (SLTT(), sliced, "steps")
            for sliced in (SLTT(6), SLTT(6, rescale=True), SLTT(6, chunk=3))
        ],
    ],
)
def test_chunks_and_a_choice_of_all_steps_change_nothing(whole, sliced, over_time):
    model, (x_TBC, target_B) = lif_network(decay=0.5), batch(6)
    one, other = (
        gradients(rule, model, x_TBC, cross_entropy(target_B), over_time=over_time)
        for rule in (whole, sliced)
    )
    assert difference(one, other) < (1e-14 if isinstance(whole, BPTT) else 1e-15)


def test_labels():
    labels = {
        "BPTT": BPTT(),
        "BPTT-chunk-1": BPTT(1),
        "BPTT-recompute": BPTT(recompute=True),
        "BPTT-truncate-3": BPTT(truncate=3),
        "OTTT-A": OTTT(chunk=2),
        "OTTT-O": OTTT(update="step"),
        "SLTT": SLTT(chunk=2),
        "SLTT-4": SLTT(4),
    }
    assert {name: rule.label for name, rule in labels.items()} == {name: name for name in labels}
