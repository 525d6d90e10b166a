"""Recipes that name a published result train with the published settings."""

import importlib
import math

import pytest
import torch

from pipeline.recipe.phases import timetable
from pipeline.recipe.recipe import Recipe
from pipeline.train.build import build_optimizer, build_schedule

# SLTT, IDE and SPIDE: torch.optim.SGD(net.parameters(), weight_decay=...). DSR's optimizers decay
# everything, too.
DECAY_ALL = (
    "cifar.cifar10_sltt",
    "cifar.cifar100_sltt",
    "imagenet.nf_resnet34_t1",
    "events.gesture_sltt_k",
    "events.cifar10dvs_sltt_k",
    "events.nmnist_ide",
    "cifar.cifar10_alexnet_f_ide",
    "cifar.cifar10_cifarnet_f_ide",
    "cifar.cifar10_alexnet_f_spide",
    "cifar.cifar10_dsr_lif",
    "events.cifar10dvs_dsr",
    "fashion.ide",
)
OWN_CIFAR100 = {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)}
CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}


def recipe(name: str) -> Recipe:
    return importlib.import_module(f"recipes.{name}").recipe()


def optimizer_of(this: Recipe) -> torch.optim.Optimizer:
    with torch.device("meta"):
        network, rule = this.model.build(), this.rule.build()
    rule.attach(network, over_time=this.over_time)
    optimizer = build_optimizer(this, network, rule)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(network.parameters())
    )
    return optimizer


@pytest.mark.parametrize("name", DECAY_ALL)
def test_weight_decay_reaches_every_parameter_where_the_published_optimizer_spares_none(
    name: str,
) -> None:
    this = recipe(name)
    groups, decay = optimizer_of(this).param_groups, this.optimizer.kwargs["weight_decay"]
    assert decay > 0 and {group["weight_decay"] for group in groups} == {decay}


@pytest.mark.parametrize(
    ("name", "statistics"),
    [
        *((f"cifar.cifar100_{each}", OWN_CIFAR100) for each in ("sltt", "dsr_if", "dsr_lif")),
        *(
            (f"cifar.cifar100_{each}", CIFAR10)
            for each in ("ottt_a", "cifarnet_f_ide", "cifarnet_f_spide")
        ),
        *((f"cifar.cifar10_{each}", CIFAR10) for each in ("sltt", "dsr_if", "dsr_lif", "ottt_a")),
    ],
)
def test_pictures_of_cifar_are_normalised_as_in_the_published_code(
    name: str, statistics: dict[str, tuple[float, ...]]
) -> None:
    kwargs = recipe(name).data.kwargs
    assert {key: kwargs[key] for key in statistics} == statistics


def rates(name: str, *, epochs: int, epoch_steps: int, asked: list[int]) -> list[float]:
    this = recipe(name)
    optimizer = optimizer_of(this)
    schedule, found = build_schedule(this, optimizer, timetable([(epochs, epoch_steps)])), []
    for step in asked:
        schedule(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_dsr_on_imagenet_has_a_cosine_by_epoch_behind_5000_steps_of_warm_up() -> None:
    steps = 1_281_167 // 144
    asked = [0, 2500, 4999, 5000, steps - 1, steps, 2 * steps - 1, 45 * steps + 7]
    expected = [1e-3 * step / 5000 for step in asked[:3]]
    expected += [0.5e-3 * (1 + math.cos(math.pi * epoch / 90)) for epoch in (0, 0, 1, 1, 45)]
    assert rates(
        "imagenet.preact18_dsr", epochs=90, epoch_steps=steps, asked=asked
    ) == pytest.approx(expected)


def test_qkformers_cosine_starts_at_the_end_of_its_warm_up() -> None:
    """Its published code: lr epoch / 5, then 1e-6 + (lr - 1e-6) / 2 (1 + cos(pi (epoch - 5) /
    195)), at fractions of epochs.
    """
    epochs = [0.0, 2.5, 5.0, 5.1, 100.0, 199.9]
    expected = [1.2e-3 * epoch / 5 for epoch in epochs[:2]]
    expected += [
        1e-6 + (1.2e-3 - 1e-6) / 2 * (1 + math.cos(math.pi * (epoch - 5) / 195))
        for epoch in epochs[2:]
    ]
    asked = [round(10 * epoch) for epoch in epochs]
    assert rates(
        "imagenet.qkformer_10_384_bptt", epochs=200, epoch_steps=10, asked=asked
    ) == pytest.approx(expected)


@pytest.mark.parametrize("channels", [384, 512, 768])
def test_the_published_logs_of_qkformer_name_the_setting_that_they_are_of(channels: int) -> None:
    this = recipe(f"imagenet.qkformer_10_{channels}_bptt")
    assert dict(this.published_setting) == {
        "time_steps": 4,
        "model.over": "time",
        "model.projection_neuron": "over_samples",
    }
    assert (this.time_steps, this.value_of("model.over")) == (2, "step")
