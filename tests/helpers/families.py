"""Small networks of the residual families, with gains and statistics under which every neuron
speaks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from pipeline.models.e_spikeformer import ESpikeFormer
from pipeline.models.max_former import MaxFormer, MSQKFormer
from pipeline.models.meta_spikeformer import MetaSpikeFormer
from pipeline.models.ms_resnet import MSResNet
from pipeline.models.nf_resnet import NFResNet
from pipeline.models.qkformer import QKFormer
from pipeline.models.sew_resnet import SEWResNet
from pipeline.models.spike_driven_transformer import SpikeDrivenTransformer
from pipeline.models.spikformer import Spikformer
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm

M = TypeVar("M", bound=nn.Module)
STREAMS = [
    ("sew", "batch"),
    ("sew_multiple", "batch"),
    ("membrane", "batch"),
    ("multiple", "batch"),
    ("multiple_all", "batch"),
    ("membrane", "sws"),
    ("multiple", "sws"),
]
SMALL = {"blocks": (1, 1), "classes": 5, "width": 8, "over": "step"}
RESNETS = {
    "sew": partial(SEWResNet, bottleneck=False, **SMALL),
    "sew, bottleneck": partial(SEWResNet, bottleneck=True, **SMALL),
    "spiking": partial(SEWResNet, bottleneck=False, shortcut="post_activation", **SMALL),
    "ms": partial(MSResNet, **SMALL),
    "ms, three, pooled": partial(MSResNet, stem="three", pooled=True, dropout=0.2, **SMALL),
    "ms, multiple": partial(MSResNet, shortcut="multiple", **SMALL),
    "ms, sws": partial(MSResNet, norm="sws", neuron=LIF(0.25, threshold=0.5), **SMALL),
    "ms, multiple, sws": partial(
        MSResNet, shortcut="multiple", norm="sws", neuron=LIF(0.25, threshold=0.5), **SMALL
    ),
    "nf": partial(
        NFResNet, blocks=(1, 2), classes=5, in_channels=3, width=4, stem="small", neuron=LIF()
    ),
    "nf, bottleneck": partial(
        NFResNet,
        blocks=(1, 2),
        classes=5,
        in_channels=3,
        width=4,
        stem="small",
        bottleneck=True,
        neuron=LIF(),
    ),
}


def awake(model: M) -> M:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "skip_gain" in name or (p.dim() == 1 and name.endswith("norm.weight")):
                p.uniform_(1, 2)
            elif name.endswith(".gain"):
                p.uniform_(0.5, 1.5)
            elif p.dim() == 1:
                p.uniform_(0, 1)
            elif not p.any():  # a classifier that starts at 0
                p.normal_()
    return model


def small_qkformer(shortcut="sew", norm="batch", **choices) -> QKFormer:
    torch.manual_seed(0)
    sizes = {"channels": 32, "depth": 4, "heads": 2, "classes": 5}
    return lively(QKFormer(**(sizes | choices), shortcut=shortcut, norm=norm))


def lively(model: M) -> M:
    """Statistics and gains under which every neuron has something to say."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            nn.init.uniform_(module.weight, 1, 3)
            nn.init.uniform_(module.bias, 0.5, 2)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.2, 1)
    for name, p in model.named_parameters():
        if "skip_gain" in name:
            nn.init.ones_(p)
        elif name.endswith("synapse.bias"):
            nn.init.uniform_(p, 0, 1.5)
    return model


def spike(x: torch.Tensor, threshold: float = 1.0) -> torch.Tensor:
    """A neuron at its first time step."""
    return (x >= threshold).to(x.dtype)


def transformer(build: Callable[..., M], **choices: Any) -> M:
    """A network with statistics and gains under which streams of real numbers stay near 0."""
    torch.manual_seed(0)
    model = build(**choices)
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm):
            nn.init.uniform_(module.weight, 1, 2)
            is_projection = ".projections." in name
            nn.init.uniform_(module.bias, *((0.5, 3) if is_projection else (-0.5, 1.5)))
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.1, 0.3)
    return model


STAGES: dict[str, Any] = {"channels": 32, "depth": 2, "classes": 5}
PYRAMID: dict[str, Any] = {"channels": (8, 16, 24, 32), "heads": 2, "classes": 5}
# Networks of the sizes of the published modules in tests/golden.
TRANSFORMERS: dict[str, Callable[..., nn.Module]] = {
    "spikformer": partial(transformer, Spikformer, heads=2, **STAGES),
    "spike-driven transformer": partial(transformer, SpikeDrivenTransformer, **STAGES),
    "max-former": partial(transformer, MaxFormer, channels=64, heads=1, classes=5),
    "ms-qkformer": partial(transformer, MSQKFormer, channels=64, heads=1, classes=5),
    "meta-spikeformer": partial(transformer, MetaSpikeFormer, distilled=True, **PYRAMID),
    "e-spikeformer": partial(transformer, ESpikeFormer, **PYRAMID),
}
