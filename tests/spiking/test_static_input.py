"""A still image against the same frames as a recording, which nothing takes for one: gradients,
statistics, memory, counts.
"""

import copy
import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.ms_resnet import MSResNet
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.preact_resnet import PreActResNet
from pipeline.models.qkformer import QKFormer
from pipeline.models.sew_resnet import SEWResNet
from pipeline.models.vgg import vgg_sws, vgg_sws_f
from pipeline.rules.base import LossTerm, Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT, selected_steps
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import RateIF
from pipeline.spiking.slice_cache import StaticInput, slice_cache
from pipeline.spiking.state import fresh_state, state_bytes
from pipeline.spiking.surrogate import Sigmoid
from pipeline.spiking.synapse import Conv2d, Linear
from tests.helpers.rule_networks import Network, attached, cross_entropy, gradients, outputs
from tests.helpers.saved import SavedBytes

STEPS = 4


def mean_of_places(_network: nn.Module, x_TBCHW: Tensor) -> Tensor:
    return x_TBCHW.mean((3, 4))


def head() -> nn.Module:
    return Network(mean_of_places)


def lively(model: nn.Module) -> Any:
    """In float64, with thresholds that are reached and no parameter without a gradient."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.double().named_parameters():
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "bias", "skip_gain")):
            uniform = torch.rand(p.shape, generator=generator, dtype=torch.float64)
            p.data.copy_(uniform + name.endswith(".weight"))
        elif "classifier" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


NEURON = {"decay": 0.7, "threshold": 0.4, "surrogate": Sigmoid()}


def small(*, norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    conv, other = Conv2d(2, 4, 3, padding=1), Conv2d(4, 4, 3, padding=1)
    first = StaticInput(conv, BatchNorm(4)) if norm else StaticInput(conv)
    return lively(nn.Sequential(first, LIF(**NEURON), other, LIF(**NEURON), head(), Linear(4, 3)))


def both(x_BCHW: Tensor, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """A still image, and its recording, which nothing takes for one."""
    still_TB = repeat(x_BCHW, steps)
    return still_TB, still_TB.contiguous()


def first_of(model: nn.Module) -> StaticInput:
    (first,) = (module for module in model.modules() if isinstance(module, StaticInput))
    return first


def images(size: int = 6, *, channels: int = 2, side: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x_BCHW = torch.randn(size, channels, side, side, generator=generator, dtype=torch.float64)
    return x_BCHW, torch.randint(3, (size,), generator=generator)


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[str]]:
    """Images that the first convolution is computed for, and gradients that meet its weight."""
    counts: Counter[str] = Counter()
    conv = next(module for module in first_of(model).modules() if isinstance(module, Conv2d))
    plain = functional.conv2d

    def conv2d(x_NCHW: Tensor, weight: Tensor, *args: Any) -> Tensor:
        if weight.shape == conv.weight.shape:  # standardised it is another tensor
            counts["images"] += len(x_NCHW)
        return plain(x_NCHW, weight, *args)

    hook = conv.weight.register_hook(lambda g: counts.update(backwards=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "conv2d", conv2d)
        yield counts
    hook.remove()


def trained(
    rule: Rule,
    model: nn.Module,
    x_TB: Tensor,
    target_B: Tensor,
    *,
    cuts: tuple[int, ...] = (),
    step: int = 3,
) -> dict[str, Tensor]:
    """Gradients, buffers, loss and logits after one batch, whole or cut into micro-batches behind
    the rows of `cuts`.

    Of HLOP, after a batch of each of two tasks.
    """
    rule.attach(model, over_time=rule.over_time_choices[0])
    found = {}
    for task in range(1 + isinstance(rule, HLOP)):
        rule.start_task(model, task)
        for first, end in itertools.pairwise([0, *cuts, len(target_B)]):
            share = (end - first) / len(target_B)
            seen = learn(
                rule,
                model,
                x_TB[:, first:end],
                cross_entropy(target_B[first:end]),
                share=share,
                step=step + task,
                rows=(first, end),
            )
            found[f"loss {task} {first}"] = torch.stack([o.loss for o in seen]).sum()
            found[f"logits {task} {first}"] = torch.stack([o.logits for o in seen]).sum(0)
        rule.end_of_batch()
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    return found | {f"rule's {name}": buffer for name, buffer in rule.named_buffers()}


def learn(
    rule: Rule, model: nn.Module, x_TB: Tensor, loss_fn, *, share=1.0, step=0, rows=(0, 6)
) -> list[LossTerm]:
    seen = []
    for objective in rule.loss_terms(model, x_TB, loss_fn, step=step, rows=range(*rows)):
        if objective.backward is not None:
            (objective.backward * share).backward()
        seen.append(objective)
    return seen


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one if one[name].numel())


RULES: dict[str, Callable[[], Rule]] = {
    "BPTT": BPTT,
    "BPTT in slices": lambda: BPTT(chunk=2),
    "BPTT in uneven slices": lambda: BPTT(chunk=3),
    "BPTT recomputed": lambda: BPTT(recompute=True),
    "BPTT truncated": lambda: BPTT(truncate=1),
    "BPTT truncated unevenly": lambda: BPTT(truncate=3),
    "SLTT": SLTT,
    "SLTT in slices": lambda: SLTT(chunk=3),
    "SLTT-1": lambda: SLTT(k=1),
    "SLTT-2": lambda: SLTT(k=2, rescale=True),
    "OTTT-A": OTTT,
    "OTTT-A in slices": lambda: OTTT(chunk=3),
    "OTTT-A, first traced": lambda: OTTT(first="traced"),
    "HLOP": lambda: HLOP(SLTT(), rows=((3, 3, 2),), learning_rate=0.1),
    "HLOP, spiking": lambda: HLOP(SLTT(k=2), rows=((3, 3, 2),), lateral_steps=20),
    "HLOP of rates": lambda: HLOP(BPTT(), rows=((3, 3, 2),), learn_from="rates"),
}
# Of one image at T = 4: how often the first synapse is computed, and how often its weight meets a
# gradient (one that is computed again, first by itself, then in what comes of it).
COSTS = dict.fromkeys(RULES, (1, 1)) | {
    "BPTT recomputed": (2, 2),
    "OTTT-A, first traced": (STEPS, STEPS),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("cuts", [(), (2,)], ids=["whole", "two unequal micro-batches"])
def test_a_still_image_is_its_recording(name, cuts):
    model, (x_BCHW, target_B) = small(norm=not name.startswith("OTTT")), images()
    twin, (still_TB, recording_TB) = copy.deepcopy(model), both(x_BCHW)
    with counted(model) as counts:
        got = trained(RULES[name](), model, still_TB, target_B, cuts=cuts)
    expected = trained(RULES[name](), twin, recording_TB, target_B, cuts=cuts)
    assert max(float(g.abs().max()) for n, g in got.items() if n.startswith("0.0")) > 1e-3
    assert distance(got, expected) < 1e-12
    calls, backwards = COSTS[name]
    tasks = 1 + name.startswith("HLOP")
    assert counts == {
        "images": calls * tasks * len(target_B),
        "backwards": backwards * tasks * (len(cuts) + 1),
    }
    assert state_bytes(model) == 0 and first_of(model).slice_cache is None


def test_two_weights_a_batch_compute_each_step():
    """OTTT-O: what is before the first neuron is another at each step."""
    (x_BCHW, target_B), states = images(), []
    for x_TB in both(x_BCHW):
        rule, model = attached(OTTT(update="step"), small(norm=False))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with counted(model) as counts:
            for objective in rule.loss_terms(model, x_TB, cross_entropy(target_B)):
                objective.backward.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert counts["images"] == STEPS * len(target_B)
        states.append(model.state_dict())
    assert distance(*states) < 1e-12


@pytest.mark.parametrize("k", [1, 2, 3])
def test_whichever_steps_learn(k):
    """Steps without a graph come before, between and behind those that learn, as the draw has
    it. Equal frames of a recording are no image.
    """
    x_BCHW, target_B = images()
    for step in range(6):
        found = []
        for x_TB, computed in zip(both(x_BCHW), (1, STEPS), strict=True):
            with counted(model := small()) as counts:
                found.append(trained(SLTT(k=k), model, x_TB, target_B, step=step))
            assert counts["images"] == computed * len(target_B)
        assert distance(*found) < 1e-12
    assert len({selected_steps(STEPS, k, seed=0, step=step) for step in range(6)}) > 2


def test_another_image_is_another_image():
    """Within one batch, where the first is remembered."""
    first, (x_BCHW, _) = first_of(small(norm=False)), images(2)
    frames = [each for x in (x_BCHW, -x_BCHW) for each in repeat(x, 2).split(1)]
    expected = [first(each) for each in frames]
    with fresh_state(first), slice_cache(first, steps=3, backwards="one"), counted(first) as counts:
        for index in (0, 1, 2, 0):
            assert torch.equal(first(frames[index]), expected[index])
    assert counts["images"] == 2 * len(x_BCHW)


def peaks(rule: Rule, model: nn.Module, x_TB: Tensor, target_B: Tensor) -> tuple[int, int]:
    """The most bytes kept for the backward of one batch, and the most of states."""
    states = 0
    rule.attach(model)
    with SavedBytes(model) as saved:
        for objective in rule.loss_terms(model, x_TB, cross_entropy(target_B)):
            if objective.backward is not None:
                objective.backward.backward()
            states = max(states, state_bytes(model))
    return saved.peak, states


@pytest.mark.parametrize(
    ("rule", "held"),
    [(SLTT, 2), (lambda: BPTT(truncate=1), 2), (lambda: BPTT(chunk=1), 1), (lambda: SLTT(k=1), 1)],
)
def test_memory(rule, held):
    """No more is kept for the backward than of a recording; what the slices share counts as state:
    y, and its gradient.
    """
    x_BCHW, target_B = images()
    still, recording = (peaks(rule(), small(), x, target_B) for x in both(x_BCHW))
    assert still[0] <= recording[0] and still[1] - recording[1] == held * (6 * 4 * 6 * 6 * 8)


def test_bfloat16_collects_in_float32():
    """The sum over many slices is not the sum of rounded sums."""
    synapse, steps = Linear(1, 1, bias=False), 1000
    nn.init.ones_(synapse.weight)
    first = StaticInput(synapse).bfloat16()
    with fresh_state(first), slice_cache(first, steps=steps, backwards="several") as slices:
        for t, x_1B in enumerate(repeat(torch.ones(1, 1, dtype=torch.bfloat16), steps).split(1)):
            slices.is_last = t == steps - 1
            slices.with_gradients(first(x_1B).sum()).backward()
    assert synapse.weight.grad is not None and synapse.weight.grad.item() == steps


def test_evaluation_computes_it_once():
    model, (still_TB, recording_TB) = small().eval(), both(images()[0])
    with counted(model) as counts:
        logits_TBK = outputs(model, still_TB)
    assert counts == {"images": still_TB.shape[1]}
    assert (logits_TBK - outputs(model, recording_TB)).abs().max() < 1e-12


def test_it_is_copied_and_pickled():
    model, (x_BCHW, target_B) = small(), images()
    gradients(SLTT(), model, repeat(x_BCHW, STEPS), cross_entropy(target_B))
    assert "0.0.weight" in model.state_dict()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(*(outputs(each, repeat(x_BCHW, 2)) for each in (twin, model)))


# ----------------------------------------------------------------------------------------- families

TINY = {"classes": 3, "in_channels": 2}
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[Callable[[], Rule], ...]]] = {
    "QKFormer": (
        lambda: QKFormer(channels=8, depth=4, heads=1, **TINY),
        (BPTT, SLTT, lambda: SLTT(k=2)),
    ),
    "QKFormer, over time": (
        lambda: QKFormer(channels=8, depth=4, heads=1, over="time", **TINY),
        (BPTT,),
    ),
    "QKFormer, sws": (
        lambda: QKFormer(channels=16, depth=4, heads=1, shortcut="multiple", norm="sws", **TINY),
        (BPTT, SLTT, OTTT),
    ),
    "SEW": (
        lambda: SEWResNet(blocks=(1, 1), bottleneck=False, width=4, over="step", **TINY),
        (BPTT, SLTT),
    ),
    "Spiking": (
        lambda: SEWResNet(
            blocks=(1, 1), bottleneck=False, width=4, shortcut="post_activation", **TINY
        ),
        (BPTT,),
    ),
    "MS": (lambda: MSResNet(blocks=(1, 1), width=4, over="step", **TINY), (BPTT, SLTT)),
    "MS, three": (
        lambda: MSResNet(blocks=(1, 1), width=4, stem="three", over="step", **TINY),
        (BPTT, SLTT),
    ),
    "VGG": (
        lambda: vgg_sws(3, in_channels=2, stages=((4,), (5,)), neuron=LIF(threshold=0.4)),
        (BPTT, SLTT, OTTT),
    ),
    "VGG, fed back": (
        lambda: vgg_sws_f(3, in_channels=2, stages=((4,), (5,)), neuron=LIF(threshold=0.4)),
        (BPTT, SLTT, OTTT),
    ),
    "NF": (lambda: nf_resnet18_small(3, in_channels=2, width=4, blocks=(1, 1)), (BPTT, SLTT, OTTT)),
    "PreAct, imagenet": (
        lambda: PreActResNet(
            blocks=(1,), width=4, stem="imagenet", head="rate", over="time", neuron=RateIF(), **TINY
        ),
        (DSR,),
    ),
    "PreAct, small": (
        lambda: PreActResNet(
            blocks=(1,), width=4, stem="small", head="linear", over="step", neuron=LIF(0.5), **TINY
        ),
        (BPTT, SLTT),
    ),
}


@pytest.mark.parametrize(
    ("family", "rule"), [(name, rule) for name, (_, rules) in FAMILIES.items() for rule in rules]
)
def test_families(family, rule):
    (x_BCHW, target_B), found, seen = images(4, side=16), [], []
    for x_TB in both(x_BCHW, 3):
        torch.manual_seed(3)
        with counted(model := lively(FAMILIES[family][0]())) as counts:
            found.append(trained(rule(), model, x_TB, target_B))
        seen.append(dict(counts))
    assert seen[0] == {"images": 4, "backwards": 1}
    moved = set(first_of(model).parameters())  # type: ignore[possibly-undefined]
    last: Any = model  # type: ignore[possibly-undefined]
    names = [name for name, p in last.named_parameters() if p in moved]
    assert max(float(found[0][name].abs().max()) for name in names) > 1e-4
    assert distance(*found) < 1e-12
