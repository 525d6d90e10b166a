"""What every rule promises, whoever wrote it. A new rule is under this contract as soon as its file
exists.

What a rule's own tests export for it is written at the head of `tests/helpers/rule_cases.py`.
"""

import copy
import pickle
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.rules.base import Rule, World
from pipeline.rules.bptt import BPTT
from pipeline.rules.hlop import HLOP
from pipeline.spiking.norm_limit import SpectralLimit
from pipeline.spiking.state import SEAMS, state_bytes
from pipeline.spiking.synapse import Conv2d, Linear
from tests.helpers.rule_cases import CASES, FILES, Case, rule_classes
from tests.helpers.rule_networks import (
    batch,
    cross_entropy,
    difference,
    gradients_on,
    learn,
    outputs,
    saved_peak,
    spikes_of,
)


@pytest.fixture(params=CASES, ids=[case.name for case in CASES])
def case(request) -> Case:
    reason = request.param.exceptions.get(request.function.__name__)
    if reason:
        pytest.skip(reason)
    # Numerics are compared in float64.
    return replace(request.param, model=lambda: request.param.model().double())


def attached(rule: Rule, model: nn.Module, **more) -> tuple[Rule, nn.Module]:
    """Under the first of the losses over time that the rule knows."""
    rule.attach(model, over_time=rule.over_time_choices[0], **more)
    return rule, model


def under(rule: Rule, model: nn.Module, *, steps: int = 4, by: Rule | None = None, **more):
    """The gradient that a batch gives under the rule, or, of the same loss, `by` another."""
    return gradients_on(steps, model, by or rule, over_time=rule.over_time_choices[0], **more)[0]


def run(rule: Rule, model: nn.Module, steps: int, *, step: int | None = 0) -> list:
    x_TBC, target = batch(steps)
    seen = learn(rule.loss_terms(model, x_TBC, cross_entropy(target), step=step))
    rule.end_of_batch()
    return seen


def mean_loss(rule: Rule, logits_TBK: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if rule.over_time_choices[0] == "mean":
        return nn.functional.cross_entropy(logits_TBK.mean(0), target)
    return torch.stack([nn.functional.cross_entropy(o, target) for o in logits_TBK]).mean()


def global_generators() -> tuple:
    numpy_state = np.random.get_state()  # noqa: NPY002
    return (
        torch.get_rng_state().tolist(),
        numpy_state[1].tolist(),
        numpy_state[2],
        random.getstate(),
    )


def with_plain_weights(model: nn.Module) -> nn.Module:
    """The same network without limits on its synapses, which HLOP refuses."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SpectralLimit):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.synapse)
    return model


def test_discovery():
    """Each file in pipeline/rules is one rule, has tests beside it, and is under this contract."""
    assert {"bptt", "dsr", "hlop", "ide", "opzo", "ottt", "sltt", "spide"} <= set(FILES)
    assert {stem: len(rule_classes(stem)) for stem in FILES} == dict.fromkeys(FILES, 1)
    assert [stem for stem in FILES if Path(__file__).with_name(f"test_{stem}.py").exists()] == FILES
    assert {case.name.split("-")[0] for case in CASES} == set(FILES)
    for rule in (case.rule() for case in CASES):
        assert rule.update in ("batch", "step") and rule.label.startswith(type(rule).__name__)


def test_losses_and_logits_sum_to_the_batch(case):
    x_TBC, target = batch(4)
    rule, model = case.quiet(), case.model()
    logits_TBK = outputs(model, x_TBC)
    seen = run(*attached(rule, model), 4)
    expected = mean_loss(rule, logits_TBK, target).item()
    assert sum(o.loss.item() for o in seen) == pytest.approx(expected, abs=1e-12)
    total_BK = torch.stack([o.logits for o in seen]).sum(0)
    assert torch.allclose(total_BK, logits_TBK.mean(0), atol=1e-12)
    assert not any(o.loss.requires_grad or o.logits.requires_grad for o in seen)


def test_backwards_sum_to_the_gradient_of_the_mean_loss(case):
    """Seen where every path is instantaneous: the bias of the readout. Rules that skip steps
    promise it in expectation only.
    """
    rule, model, (x_TBC, target) = case.quiet(), case.model(), batch(4)
    logits_TBK = outputs(model, x_TBC).detach().requires_grad_()
    (g_TBK,) = torch.autograd.grad(mean_loss(rule, logits_TBK, target), logits_TBK)
    readout = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    seen = run(*attached(rule, model), 4)
    if all(o.backward is not None for o in seen):
        assert torch.allclose(readout.bias.grad, g_TBK.sum((0, 1)), atol=1e-12)
        assert all(o.backward.item() == pytest.approx(o.loss.item(), abs=1e-14) for o in seen)
    else:
        assert any(o.backward is not None for o in seen)


def test_memory_is_as_claimed(case):
    few, many = (
        saved_peak(rule, case.model(), *batch(steps), over_time=rule.over_time_choices[0])
        for rule, steps in ((case.rule(), 2), (case.rule(), 16))
    )
    memory = case.rule().memory
    assert few > 0 and memory in ("constant", "linear")
    assert many == few if memory == "constant" else many > 4 * few


def test_one_step_equals_bptt(case):
    model, rule = case.model(), case.rule()
    for name in ("chunk", "truncate"):  # longer slices than the sequence are refused
        if getattr(rule, name, None):
            setattr(rule, name, 1)
    expected = under(rule, model, steps=1, by=BPTT())
    assert max(g.abs().max() for g in expected.values()) > 1e-3
    assert difference(under(rule, model, steps=1), expected) < 1e-14


def test_attach_leaves_the_checkpoint_alone(case):
    rule, model = case.rule(), case.model()
    before = copy.deepcopy(model.state_dict())
    run(*attached(rule, model), 4)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not [key for key in rule.state_dict() if key in before]


def test_release_restores(case):
    rule, model = case.rule(), case.model()
    seams = [
        (m, seam, getattr(m, seam)) for m in model.modules() for seam in SEAMS if hasattr(m, seam)
    ]
    before = under(rule, model, by=BPTT())
    under(rule, model)
    assert all(getattr(m, seam) is value for m, seam, value in seams)
    assert difference(under(rule, model, by=BPTT()), before) == 0
    attached(rule, case.model())  # a released rule may be attached again


def test_second_attach_is_refused(case):
    rule, model = attached(case.rule(), case.model())
    with pytest.raises(ValueError, match=rf"^{re.escape(rule.label)}: "):
        attached(rule, case.model())
    with pytest.raises(ValueError, match=r"BPTT: .* must not be attached to another rule"):
        BPTT().attach(model)


def test_the_forward_is_untouched(case):
    model, x_TBC = case.model(), batch(4)[0]
    record = spikes_of(model)

    def spikes(ran: Callable[[], object]) -> dict[str, Tensor]:
        for each in record.values():
            each.clear()
        ran()
        # A rule that computes steps a second time does so after the first.
        return {name: torch.cat(each)[:4] for name, each in record.items()}

    logits_TBK = outputs(model, x_TBC)
    before = spikes(lambda: outputs(model, x_TBC))
    learning = spikes(lambda: run(*attached(case.quiet(), model), 4))
    assert all(torch.equal(learning[name], each) for name, each in before.items())
    assert torch.equal(outputs(model, x_TBC), logits_TBK)


def test_draws_do_not_touch_the_global_generators(case):
    found = []
    for seed in (0, 1):
        model, rule = case.model(), case.rule()
        # NumPy's legacy generator is the global one.
        for seed_all in (torch.manual_seed, np.random.seed, random.seed):
            seed_all(seed)
        states = global_generators()
        found.append(under(rule, model, step=5, world=World(seed=7)))
        assert global_generators() == states
    assert difference(*found) == 0


def test_nothing_is_left_after_a_batch(case):
    rule, model = attached(case.rule(), case.model())
    run(rule, model, 4)
    assert state_bytes(model) == 0
    one, other = (outputs(each, batch(4)[0]) for each in (model, copy.deepcopy(model)))
    assert torch.equal(one, other)


def test_a_batch_that_fails_leaves_the_model_usable(case):
    rule, model = attached(case.rule(), case.model())
    with pytest.raises(ZeroDivisionError):
        list(rule.loss_terms(model, batch(4)[0], lambda logits_BK: 1 / 0))
    assert state_bytes(model) == 0
    run(rule, model, 4)


def test_pickles(case):
    rule, model = case.rule(), case.model()
    assert pickle.loads(pickle.dumps(rule)).label == rule.label
    run(*attached(rule, model), 4)
    rule.release()
    run(*attached(pickle.loads(pickle.dumps(rule)), model), 4)


def test_resumes_exactly(case):
    """Three batches at a stretch, against two, a checkpoint of weights and rule, and a third in
    fresh objects.
    """

    def trained(rule: Rule, model: nn.Module, steps: range) -> dict[str, Tensor]:
        for step in steps:
            model.zero_grad()
            run(rule, model, 4, step=step)
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        return rule.state_dict() | model.state_dict()

    whole, first, second = (
        attached(case.rule(), case.model(), world=World(seed=3)) for _ in range(3)
    )
    expected = trained(*whole, range(3))
    trained(*first, range(2))
    for stopped, fresh in zip(first, second, strict=True):
        fresh.load_state_dict(stopped.state_dict())
    got = trained(*second, range(2, 3))
    assert got.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


def test_hlop_around_it_is_orthogonal(case):
    """In the second task no weight learns in the subspace of the first, vectors of parameters rest,
    and learning goes on.
    """
    rule, model = case.rule(), with_plain_weights(case.model())
    synapses = [module for module in model.modules() if isinstance(module, (Linear, Conv2d))]
    if not isinstance(rule, HLOP):
        rule = HLOP(rule, rows=((3,) * len(synapses), (1,) * len(synapses)))
    attached(rule, model, world=World(seed=3))
    for step in range(2):
        run(rule, model, 4, step=step)
    rule.start_task(model, 1)
    model.zero_grad()
    run(rule, model, 4, step=2)
    for synapse, subspace in zip(synapses, rule.subspaces, strict=True):
        if synapse.weight.grad is not None:  # a readout that the rule does not use has none
            g_KC, old = synapse.weight.grad.flatten(1), subspace.get_buffer("old")
            assert len(old) >= 3 and (g_KC @ old.T).abs().max() < 1e-14 + 1e-13 * g_KC.abs().max()
            assert g_KC.abs().max() > 1e-5
    assert all(not p.grad.any() for p in model.parameters() if p.dim() == 1 and p.grad is not None)
