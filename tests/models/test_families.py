"""What every residual family owes: slices of time equal the whole, and every weight learns."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.ms_resnet import ms_resnet
from pipeline.models.qkformer import qkformer_10
from pipeline.models.residual import Residual
from pipeline.models.sew_resnet import sew_resnet
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.binary import binary_synapses
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF, named_neurons
from pipeline.spiking.norm import BatchNorm
from tests.helpers.families import (
    RESNETS,
    STREAMS,
    TRANSFORMERS,
    awake,
    small_qkformer,
)
from tests.helpers.rule_networks import cross_entropy, learn, outputs
from tests.helpers.small import recipes_of

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    name: lambda build=build: awake(build()) for name, build in RESNETS.items()
}
FAMILIES |= {
    f"qkformer, {shortcut}, {norm}": partial(small_qkformer, shortcut, norm)
    for shortcut, norm in STREAMS
}
FAMILIES |= {name: partial(build, over="step") for name, build in TRANSFORMERS.items()}


full = partial(pytest.param, marks=pytest.mark.full)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("mode", "still"),
    [("eval", True), ("train", False), full("eval", False), full("train", True)],
)
def test_slices_equal_the_whole(family, mode, still):
    model = FAMILIES[family]().double().train(mode == "train")
    x_TBCHW = torch.randn(3, 2, 3, 33, 32, dtype=torch.float64)
    x_TBCHW = repeat(x_TBCHW[0], 3) if still else x_TBCHW
    for dropout in [m for m in model.modules() if isinstance(m, Dropout)]:
        dropout.share = 0.0  # a mask is drawn for each fresh_state
    # PaddedNorm reads its running statistics in training as well, and each call updates them.
    whole_TBK = outputs(copy.deepcopy(model), x_TBCHW)
    assert whole_TBK.shape == (3, 2, 5) and whole_TBK.std() > 0
    assert (whole_TBK - outputs(model, *x_TBCHW.split(1))).abs().max() < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "make_rule", [BPTT, partial(SLTT, k=1, rescale=True), OTTT], ids=["BPTT", "SLTT-1", "OTTT"]
)
def test_every_weight_that_the_loss_reaches_learns(family, make_rule: Callable[[], Rule]):
    """OTTT takes the normaliser-free networks alone, and SLTT those with a membrane."""
    model, rule, refusal = FAMILIES[family](), make_rule(), ""
    if isinstance(rule, OTTT) and any(isinstance(m, BatchNorm) for m in model.modules()):
        refusal = r"OTTT.*got batch norm at"
    elif isinstance(rule, SLTT) and not named_neurons(model):
        refusal = "SLTT-1: the model must have LIF neurons, .* got ESpikeFormer"
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            rule.attach(model)
        return
    rule.attach(model)
    x_TBCHW = repeat(3 * torch.randn(3, 3, 32, 32), 2)
    learn(rule.loss_terms(model, x_TBCHW, cross_entropy(torch.tensor([0, 1, 2])), step=0))
    silent = [
        n
        for n, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or p.grad.abs().max() == 0
    ]
    assert silent == []


# -------------------------------------------------------------------------------------------- size


FAMILIES_OF_SIZE: dict[str, Callable[[], nn.Module]] = {
    "QKFormer-10-384": partial(qkformer_10, 384),
    "QKFormer-10-384, multiple": partial(qkformer_10, 384, shortcut="multiple"),
    "QKFormer-10-384, multiple, sws": partial(qkformer_10, 384, shortcut="multiple", norm="sws"),
    "QKFormer-10-768": partial(qkformer_10, 768),
    "SEW-ResNet-50": partial(sew_resnet, 50, over="step"),
    "Spiking ResNet-50": partial(sew_resnet, 50, shortcut="post_activation", over="step"),
    "MS-ResNet-34": partial(ms_resnet, 34, over="step"),
    "MS-ResNet-104": partial(ms_resnet, 104, over="step"),
    "MS-ResNet-34, multiple, sws": partial(
        ms_resnet, 34, shortcut="multiple", norm="sws", neuron=LIF(0.25, threshold=0.5)
    ),
}
RECIPES = {
    file.stem: file
    for file in sorted((Path(__file__).parents[2] / "recipes" / "imagenet").glob("*_sei_bw*.py"))
}


def network(name: str) -> nn.Module:
    """Of a family, or of the last stage of a recipe, its silent branches awake: behind a gain of 0
    every gradient is 0.
    """
    model = (
        recipes_of(RECIPES[name])[-1].model.build() if name in RECIPES else FAMILIES_OF_SIZE[name]()
    )
    for module in model.modules():
        if isinstance(module, BatchNorm) and not module.weight.any():
            nn.init.ones_(module.weight)
        elif isinstance(module, Residual) and module.skip_gain is not None:
            nn.init.ones_(module.skip_gain)
    return model


def test_the_recipes_with_1_bit_weights():
    assert list(RECIPES) == [
        "ms_resnet34_sei_bw",
        "qkformer_10_384_sei_bw",
        "qkformer_10_384_sei_bw_reading_b",
        "qkformer_10_512_sei_bw",
        "qkformer_10_768_sei_bw",
    ]


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("make_rule", [BPTT, SLTT])
@pytest.mark.parametrize("name", [*FAMILIES_OF_SIZE, *RECIPES])
def test_gradients_are_finite_in_bf16(name, make_rule):
    model, rule, shapes = network(name), make_rule(), []
    assert bool(binary_synapses(model)) == (name in RECIPES)
    rule.attach(model)

    def loss_fn(logits_BK: Tensor) -> Tensor:
        shapes.append(logits_BK.shape)
        return nn.functional.cross_entropy(logits_BK, torch.tensor([3]))

    x_TBCHW = torch.randn(1, 1, 3, 224, 224)
    with torch.autocast("cpu", torch.bfloat16):
        for objective in rule.loss_terms(model, x_TBCHW, loss_fn, step=0):
            assert objective.backward is not None and objective.backward.isfinite()
            objective.backward.backward()
    assert shapes == [(1, 1000)]
    assert [
        key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ] == []
    # it has come down to the stem
    assert next(model.parameters()).grad.any()  # type: ignore[union-attr]
