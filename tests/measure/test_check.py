"""`pipeline.check`: each fault is found at its module, and sound networks have none."""

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import pipeline
from pipeline.core import printing
from pipeline.models.convnet import convnet
from pipeline.models.nf_resnet import NFResNet
from pipeline.models.vgg import vgg_sws
from pipeline.spiking.encode import repeat
from pipeline.spiking.integer import IntegerNeuron
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import State
from pipeline.spiking.surrogate import Sigmoid
from pipeline.spiking.synapse import Linear, apply_folded
from tests.helpers.families import RESNETS
from tests.helpers.small import Command, Done, Refused, make_run, small_recipe, train_inline


class Net(nn.Module):
    """Two layers of neurons with places for other modules: `[T, B, 12]` to `[T, B, 5]`."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.first, self.norm1, self.neuron1 = Linear(12, 32), BatchNorm(32), LIF()
        self.middle: nn.Module = nn.Identity()
        self.second, self.norm2, self.neuron2 = Linear(32, 32), BatchNorm(32), LIF()
        self.last = Linear(32, 5)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x_TB: Tensor) -> Tensor:
        x_TB = self.middle(self.neuron1(self.norm1(self.first(x_TB))))
        return self.last(self.neuron2(self.norm2(self.second(x_TB))))


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(a)
        ctx.width = width
        return (a >= 0).to(a)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * (1 - ctx.saved_tensors[0].abs() / ctx.width).clamp(0), None


class Scaled(torch.autograd.Function):
    """`factor * v`, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, factor: Tensor, errors: tuple[float, float]) -> Tensor:
        ctx.save_for_backward(v, factor)
        ctx.errors = errors
        return factor * v

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        v, factor = ctx.saved_tensors
        of_v, of_factor = ctx.errors
        return (
            of_v * factor * grad_outputs[0],
            (of_factor * v * grad_outputs[0]).sum().view_as(factor),
            None,
        )


class Own(nn.Module):
    """A LIF of one's own, with a fault by name, or none.

    `errors` are factors of the gradients through the membrane, and of the decay.
    """

    def __init__(
        self,
        fault: str = "",
        threshold: float = 1.0,
        *,
        errors: tuple[float, float] = (1.0, 1.0),
        width: float = 1.0,
    ) -> None:
        super().__init__()
        self.fault, self.threshold, self.left = fault, threshold, torch.zeros(())
        self.errors, self.width, self.decay = errors, width, nn.Parameter(torch.tensor([0.5]))
        self.state = State("Own")

    def forward(self, x_TB: Tensor) -> Tensor:
        v = self.state.read("v")
        if v is None or self.fault == "forgets calls":
            v = torch.zeros_like(x_TB[0])
            v = v + self.left if self.fault == "leaks" else v
        spikes = []
        for x_B in x_TB.detach() if self.fault == "detaches its input" else x_TB:
            v = v.detach() if self.fault == "detaches steps" else v
            kept: Any = Scaled.apply(v, self.decay, self.errors)
            u = x_B + (0 if self.fault == "forgets steps" else 1) * kept
            spikes.append(Spike.apply(u - self.threshold, self.width))
            v = u - spikes[-1].detach()
        self.state.write("v", v)
        self.left = v
        return torch.stack(spikes).float()  # the usual cast to fp32, also of a float64 input


class OverSamples(nn.Module):
    """The fault of the published QKFormer: a neuron reads `[T B, C]`, so time runs over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.neuron = LIF()

    def forward(self, x_TBC: Tensor) -> Tensor:
        return self.neuron(x_TBC.flatten(0, 1).unsqueeze(1)).view_as(x_TBC)


class WithoutOldMembrane(LIF):
    def step(self, x_B: Tensor, v_B: Tensor) -> tuple[Tensor, Tensor]:
        return super().step(x_B, v_B.detach())


class Does(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x_TB: Tensor) -> Tensor:
        return self.function(x_TB)


class Overwrites(nn.Module):
    """`.data` hides from autograd that the value which the sigmoid keeps has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def forward(self, x_TB: Tensor) -> Tensor:
        y_TB = self.sigmoid(x_TB)
        y_TB.data.mul_(2)
        return y_TB


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (g,), (x, weight) = grad_outputs, ctx.saved_tensors
        return g @ weight, 1.01 * torch.einsum("tbo,tbi->oi", g, x)


class WrongWeightGradient(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return Product.apply(input, self.weight)  # type: ignore[return-value]


class Buffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("left", torch.zeros(()))

    def forward(self, x_TB: Tensor) -> Tensor:
        y_TB = x_TB + 0.1 * self.left
        self.left = x_TB.mean().detach()
        return y_TB


class Counts(nn.Module):
    """A buffer of another shape after the first batch, and a module without a float output."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shape", torch.zeros(0))
        self.size = Does(lambda x: x.shape[0])

    def forward(self, x_TB: Tensor) -> Tensor:
        self.shape = torch.ones(self.size(x_TB))
        return x_TB * 2


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Linear(32, 32)

    def forward(self, x_TB: Tensor) -> Tensor:
        return x_TB + self.branch(x_TB).detach()


class Unused(nn.Identity):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


class Calls(nn.Module):
    """Calls a neuron once for each step, on `[B, C]`."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x_TB: Tensor) -> Tensor:
        return torch.stack([self.neuron(x_B) for x_B in x_TB])


class OneStep(nn.Module):
    """`Own` on a step `[B, C]`, with `x_TB` by keyword."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.state = State("OneStep")
        self.fault = fault

    def forward(self, x_B: Tensor) -> Tensor:
        v_B: Any = self.state.read("v")
        v_B = torch.zeros_like(x_B) if v_B is None else v_B
        u_B = x_B + 0.5 * (v_B.detach() if self.fault else v_B)
        s_B: Any = Spike.apply(u_B - 1, 1.0)
        self.state.write("v", u_B - s_B.detach())
        return s_B


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.neuron = LIF()

    def forward(self, x_TB: Tensor) -> Tensor:
        return self.neuron(x_TB=x_TB)


class LazyBuffer(nn.Module):
    def forward(self, x_TB: Tensor) -> Tensor:
        if "mask" not in dict(self.named_buffers()):
            self.register_buffer("mask", torch.linspace(0.5, 1, x_TB.shape[-1]))
        return x_TB * self.get_buffer("mask")


class Frozen(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


class DropsInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Linear(32, 32)

    def forward(self, x_TB: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x_TB), 0.3, self.training)


class Inline(nn.Module):
    """Neurons in the forward of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.state = nn.Linear(12, 16), nn.Linear(16, 5), State("Inline")

    def forward(self, x_TB: Tensor) -> Tensor:
        v_B: Any = self.state.read("v")
        answers = []
        for x_B in x_TB:
            u_B = self.first(3 * x_B) + (0 if v_B is None else 0.5 * v_B)
            s_B: Any = Spike.apply(u_B - 1, 1.0)
            v_B = u_B - s_B.detach()
            answers.append(self.last(s_B))
        self.state.write("v", v_B)
        return torch.stack(answers)


def stale() -> BatchNorm:
    norm = BatchNorm(32)
    norm.running_mean += 1000
    return norm


class Folded(nn.Module):
    """torch's batch norm over the steps and samples of a call."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x_TB: Tensor) -> Tensor:
        return apply_folded(self.norm, x_TB)


FAULTS: dict[str, tuple[Callable[[], dict[str, nn.Module]], str, str]] = {
    "membrane over samples": (lambda: {"neuron2": OverSamples()}, "batch", "neuron2.neuron"),
    "mean over samples": (
        lambda: {"middle": Does(lambda x: x - x.mean(1, True))},
        "batch",
        "middle",
    ),
    "statistics in evaluation": (
        lambda: {"norm2": Folded(nn.BatchNorm1d(32, track_running_stats=False))},
        "batch",
        "norm2.norm",
    ),
    "a membrane per call": (lambda: {"neuron2": Own("forgets calls")}, "slices", "neuron2"),
    "a sum over steps": (lambda: {"middle": Does(lambda x: x.cumsum(0))}, "slices", "middle"),
    "a membrane left": (lambda: {"neuron1": Own("leaks")}, "state", "neuron1"),
    "a buffer left": (lambda: {"middle": Buffer()}, "state", "middle"),
    "steps detached": (lambda: {"neuron1": Own("detaches steps")}, "gradients", "neuron1"),
    "input detached": (lambda: {"neuron1": Own("detaches its input")}, "gradients", "neuron1"),
    "decay left out": (lambda: {"neuron1": Own(errors=(2.0, 1.0))}, "gradients", "neuron1"),
    "twice the decay's": (lambda: {"neuron1": Own(errors=(1.0, 2.0))}, "gradients", "neuron1"),
    "steps detached, step by step": (
        lambda: {"neuron1": Calls(OneStep("detaches"))},
        "gradients",
        "neuron1.neuron",
    ),
    "LIF detached": (lambda: {"neuron2": WithoutOldMembrane()}, "gradients", "neuron2"),
    "branch detached": (lambda: {"middle": Detached()}, "gradients", "middle"),
    "backward": (lambda: {"second": WrongWeightGradient(32, 32)}, "gradients", "second"),
    "overwritten": (lambda: {"middle": Overwrites()}, "gradients", "middle"),
    "refused by autograd": (
        lambda: {"middle": Does(lambda x: x.sigmoid().mul_(2))},
        "gradients",
        "middle",
    ),
    "dead": (lambda: {"neuron2": LIF(threshold=1000.0)}, "activity", "neuron2"),
    "dead, its own": (lambda: {"neuron2": Own(threshold=1000.0)}, "activity", "neuron2"),
    "saturated": (
        lambda: {"norm2": nn.Identity(), "second": Does(lambda x: x + 9)},
        "activity",
        "neuron2",
    ),
    "unused": (lambda: {"middle": Unused()}, "activity", "middle.layer"),
    "no update": (lambda: {"norm1": BatchNorm(32, momentum=0.0)}, "norms", "norm1"),
    "stale": (lambda: {"norm1": stale()}, "norms", "norm1"),
    "no leak": (lambda: {"neuron1": LIF(0.0)}, "time", "neuron1"),
    "no memory": (lambda: {"neuron1": Own("forgets steps")}, "time", "neuron1"),
    "no neurons": (
        lambda: {"neuron1": nn.ReLU(), "neuron2": nn.ReLU()},
        "time",
        "the network itself",
    ),
}


def faults(network: nn.Module, x_TB: Tensor) -> dict[str, str]:
    verdicts = pipeline.check(network, x_TB)
    assert len({verdict.question for verdict in verdicts}) == 7
    return {each.question: each.module for each in verdicts if each.state == "fault"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_at_its_module(name: str) -> None:
    torch.manual_seed(0)
    parts, question, module = FAULTS[name]
    assert faults(Net(**parts()), torch.rand(4, 6, 12)).get(question) == module


PRINTED = """\
fault batch     neuron2.neuron
                its output for sample 0 depends on the other samples
                to do: keep samples apart: a neuron needs [T, B, ...], steps
                first, and a norm needs running statistics
ok    slices    4 calls on one step equal one call on 4 steps
ok    state     a batch leaves no state behind for the next one
ok    gradients right: those of each module equal another derivative
note  activity  the gradient of first.bias, second.bias is 0
note  norms     training and evaluation differ: norm1 is 4.7 standard deviations
                from the batch, norm2 is 3.4 standard deviations from the batch
ok    time      the answer changes with T; each layer of neurons carries state
checked on 6 samples of random values
"""
SOUND: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "own neurons": (
        lambda: Net(neuron1=Own(), neuron2=LIF(0.9, reset_gradient="kept")),
        (4, 6, 12),
    ),
    "torch's batch norm": (
        lambda: Net(
            norm2=Folded(nn.BatchNorm1d(32)),
            neuron2=LIF(0.25, scale_input=True, reset="zero", surrogate=Sigmoid(4.0)),
        ).train(),
        (4, 6, 12),
    ),
    "neither state nor floats": (lambda: Net(middle=Counts()), (4, 6, 12)),
    "a narrow surrogate": (lambda: Net(neuron1=Own(width=0.01)), (4, 6, 12)),
    "step by step": (lambda: Net(neuron1=Calls(OneStep()), neuron2=ByKeyword()), (4, 6, 12)),
    "an encoder": (lambda: Net(middle=Does(lambda x: torch.bernoulli(x / 2))), (4, 6, 12)),
    "dropout in a forward": (lambda: Net(middle=DropsInTraining()), (4, 6, 12)),
    "spectral norm": (lambda: Net(second=spectral_norm(nn.Linear(32, 32))), (4, 6, 12)),
    "spectral norm, the old one": (
        lambda: Net(second=nn.utils.spectral_norm(nn.Linear(32, 32))),
        (4, 6, 12),
    ),
    "a lazy buffer": (lambda: Net(middle=LazyBuffer()), (4, 6, 12)),
    "a frozen norm": (lambda: Net(norm2=Folded(Frozen(32))), (4, 6, 12)),
    "neurons in its forward": (Inline, (4, 6, 12)),
    "writes in place": (lambda: Net(middle=nn.ReLU(inplace=True)), (4, 6, 12)),
    "convnet": (partial(convnet, 5, stages=((8,), (8,)), dropout=0.2), (3, 4, 3, 16, 16)),
    "vgg": (partial(vgg_sws, 5, stages=((8,), (8,))), (3, 4, 3, 16, 16)),
    "nf": (
        partial(
            NFResNet, blocks=(1, 1), classes=5, in_channels=3, width=8, stem="small", neuron=LIF()
        ),
        (3, 4, 3, 16, 16),
    ),
    "sew": (RESNETS["sew"], (3, 4, 3, 32, 32)),
    "ms": (RESNETS["ms"], (3, 4, 3, 32, 32)),
    "integer neurons": (
        lambda: nn.Sequential(nn.Linear(12, 32), IntegerNeuron(), nn.Linear(32, 5)),
        (4, 6, 12),
    ),
}


@pytest.mark.parametrize(
    ("make", "question", "module", "said"),
    [
        (SOUND["an encoder"][0], "batch", "middle", "it draws random numbers"),
        (SOUND["dropout in a forward"][0], "slices", "", "training: middle draws random numbers"),
        (Inline, "gradients", "the network itself", "not checked, because .* step function"),
    ],
)
def test_the_verdict_names_what_is_not_checked(
    make: Callable[[], nn.Module], question: str, module: str, said: str
) -> None:
    torch.manual_seed(0)
    found = {each.question: each for each in pipeline.check(make(), torch.rand(4, 6, 12))}
    assert (found[question].state, found[question].module) == ("note", module)
    assert re.search(said, found[question].text)


def test_it_leaves_network_and_random_state_as_they_are() -> None:
    torch.manual_seed(0)
    network = convnet(5, stages=((8,),), dropout=0.2).train()
    before, x_TB = copy.deepcopy(network.state_dict()), torch.randn(2, 2, 3, 8, 8)
    after_draw = torch.random.get_rng_state()
    pipeline.check(network, x_TB)
    assert torch.equal(torch.random.get_rng_state(), after_draw)
    assert torch.get_default_dtype() == torch.float32 and network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert {len(module._forward_hooks) for module in network.modules()} == {0}


@pytest.mark.parametrize(
    "name",  # of four networks one quick seed is in test_planted_faults.py
    [
        pytest.param(name, marks=[pytest.mark.full] if name in ("vgg", "nf", "sew", "ms") else [])
        for name in SOUND
    ],
)
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.full) for s in range(1, 20))]
)
def test_sound_networks_have_no_fault(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    make, shape = SOUND[name]
    network, x_TB = make(), torch.rand(shape) if seed % 3 else torch.randn(shape)
    assert faults(network, x_TB if seed % 2 else repeat(x_TB[0], shape[0])) == {}


@pytest.mark.parametrize(
    ("x_TB", "said"),
    [
        (torch.zeros(1, 2, 12), r"at least 2 steps and 2 samples; got \(1, 2, 12\)"),
        (torch.zeros(4, 1, 12), "at least 2 steps and 2 samples"),
        (torch.zeros(4, 2, 13), "must run on the batch in float64.*at first"),
        ([1.0], "got list"),
    ],
)
def test_bad_input_is_refused(x_TB: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^check: .*{said}"):
        pipeline.check(Net(), x_TB)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_networks.py").write_text(
        "import torch\n"
        "from tests.measure.test_check import Net, OverSamples\n"
        "def faulty():\n"
        "    torch.manual_seed(0)\n"
        "    return Net(neuron2=OverSamples())\n"
        "def sound():\n"
        "    torch.manual_seed(0)\n"
        "    return Net()\n"
        "size = 3\n"
        "def broken():\n"
        "    return [].gone\n"
    )
    yield "my_networks"
    sys.modules.pop("my_networks", None)


def test_what_the_command_prints(
    module: str, spiketrain: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = lambda **_: Console(width=80)
    monkeypatch.setattr(printing, "new_console", narrow)
    code, out, _ = spiketrain("check", f"{module}:faulty", "--input", "4,6,12")
    assert code == 1 and out == PRINTED


def test_json_and_the_exit_code_of_a_sound_network(module: str, spiketrain: Command) -> None:
    code, out, _ = spiketrain("check", f"{module}:sound", "--input", "4,6,12", "--format", "json")
    verdicts = json.loads(out)
    assert code == 0 and [each["question"] for each in verdicts][::6] == ["batch", "time"]
    assert set(verdicts[0]) == {"question", "state", "text", "module", "advice"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("my_networks:sound", "check: MODULE:BUILDER needs --input T,B,.*; got no --input"),
        ("my_networks:sound --input 4,x,12", "got 4,x,12"),
        ("my_networks:gone --input 4,6,12", "check: MODULE:BUILDER must be .*gone"),
        ("nowhere:gone --input 4,6,12", "No module named 'nowhere'"),
        ("my_networks:size --input 4,6,12", "function without arguments"),
        (
            "my_networks:broken --input 4,6,12",
            "my_networks:broken must run .* got AttributeError: 'list' object has no",
        ),
        (
            "a/nets.py:sound --input 4,6,12",
            r"not of a file; got a/nets\.py:sound, try a\.nets:sound",
        ),
        ("my_networks:sound --input 4,6,13", "check: the network must run on the batch"),
        ("my_networks:sound --input 4,6,12 --set a=1", "--set must come with a recipe file"),
        ("a.py --input 4,6,12", "--input must come with MODULE:BUILDER; got a.py"),
        ("a.py --trust mine", "--trust must come with a run; got a.py"),
        ("gone", "no run 'gone'"),
    ],
)
def test_a_mistake_is_refused_in_one_line(
    words: str, said: str, module: str, refused: Refused
) -> None:
    assert re.search(said, refused("check", *words.split()))


def test_a_run_and_its_recipe(tmp_path: Path, spiketrain: Command) -> None:
    recipe = small_recipe(epochs=1)
    make_run(tmp_path / "run", recipe)
    train_inline(tmp_path / "run", recipe)
    code, out, error = spiketrain("check", str(tmp_path / "run"))
    assert code == 0 and out.count("\n") >= 8 and error == ""
    assert out.endswith("checked on 4 samples of the training data\n")


def test_random_values_replace_data_that_are_not_there(tmp_path: Path, done: Done) -> None:
    (tmp_path / "mine.py").write_text(
        "from pipeline.data.datasets.beton import Beton\n"
        "from pipeline.recipe.recipe import spec\n"
        "from tests.helpers.small import small_recipe\n"
        "def recipe():\n"
        "    data = spec(Beton, folder='gone', classes=10, channels=1, size=8,\n"
        "        mean=(0.5,), std=(0.5,))\n"
        "    return small_recipe(data=data)\n"
    )
    out = done("check", str(tmp_path / "mine.py"))
    assert "checked on 4 samples of random values, because the data cannot be read: " in out
