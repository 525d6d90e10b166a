"""Recipes that name a published setting hold it."""

import importlib
import math

import pytest
import torch

from pipeline.recipe.phases import timetable
from pipeline.recipe.recipe import Recipe
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.spiking.dropout import Dropout
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


def recipe_of(name: str) -> Recipe:
    return importlib.import_module(f"recipes.{name}").recipe()


def published_rows(tasks: int) -> list[tuple[int, ...]]:
    """What the published scripts for permuted MNIST add in each task, written out as they compute
    it.
    """
    more = [(70 - 20 * (task // 3),) * 3 for task in range(1, tasks)]
    return [(80, 200, 100), *more]


@pytest.mark.parametrize("inner", ["bptt", "dsr", "ottt", "sltt"])
def test_ten_permutations_add_the_published_rows(inner: str) -> None:
    recipe = recipe_of(f"continual.permuted_fashion_hlop_{inner}")
    rule = recipe.rule.build()
    assert isinstance(rule, HLOP)
    rows = [rule.rows[min(task, len(rule.rows) - 1)] for task in range(len(recipe.phases))]
    assert rows == published_rows(10) and sum(second for _, second, _ in rows[:-1]) == 580


@pytest.mark.parametrize(
    ("name", "backward"),
    [
        ("cifar.cifar10_dsr_lif", "published"),
        ("cifar.cifar10_dsr_lif_t5", "published"),
        ("cifar.cifar100_dsr_lif", "published"),
        ("events.cifar10dvs_dsr", "published"),
        # of IF neurons, which have one backward
        ("cifar.cifar10_dsr_if", "rates"),
        ("cifar.cifar100_dsr_if", "rates"),
        ("imagenet.preact18_dsr", "rates"),
    ],
)
def test_neurons_of_dsr_have_the_published_backward(name: str, backward: str) -> None:
    rule = recipe_of(name).rule.build()
    assert isinstance(rule, DSR) and rule.backward == backward


def test_the_second_stage_on_imagenet_is_calibrated_on_the_anns_activations() -> None:
    rule = recipe_of("imagenet.preact18_dsr").rule.build()
    assert (rule.calibration_batches, rule.calibrate_on) == (5, "activations")


@pytest.mark.parametrize(
    ("name", "share", "synapses"),
    [
        ("cifar.cifar10_alexnet_f_ide", 0.2, 6),
        ("cifar.cifar10_cifarnet_f_ide", 0.2, 6),
        ("cifar.cifar100_cifarnet_f_ide", 0.2, 6),
        ("cifar.cifar10_alexnet_f_spide", 0.2, 6),
        ("cifar.cifar10_cifarnet_f_spide", 0.25, 6),
        ("cifar.cifar100_cifarnet_f_spide", 0.25, 6),
        ("events.nmnist_ide", 0.2, 2),
        ("events.cifar10dvs_spide", 0.0, 0),
    ],
)
def test_dropout_stands_on_the_currents_and_not_on_the_readout(
    name: str, share: float, synapses: int
) -> None:
    network = recipe_of(name).model.build()
    shares = [each.share for each in network.equilibrium.modules() if isinstance(each, Dropout)]
    assert shares == [share] * synapses and network.dropout.share == 0


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
    this = recipe_of(name)
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
    kwargs = recipe_of(name).data.kwargs
    assert {key: kwargs[key] for key in statistics} == statistics


def rates(name: str, *, epochs: int, epoch_steps: int, asked: list[int]) -> list[float]:
    this = recipe_of(name)
    optimizer = optimizer_of(this)
    schedule, found = build_schedule(this, optimizer, timetable([(epochs, epoch_steps)])), []
    for step in asked:
        schedule(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_dsr_on_imagenet_has_a_cosine_by_epoch_behind_5000_steps_of_warm_up() -> None:
    steps = 1_281_167 // 144
    asked = [0, 2500, 4999, 5000, steps - 1, steps, 2 * steps - 1, 45 * steps + 7]
    expected = [
        *(1e-3 * step / 5000 for step in asked[:3]),
        *(0.5e-3 * (1 + math.cos(math.pi * epoch / 90)) for epoch in (0, 0, 1, 1, 45)),
    ]
    assert rates(
        "imagenet.preact18_dsr", epochs=90, epoch_steps=steps, asked=asked
    ) == pytest.approx(expected)


def test_qkformers_cosine_starts_at_the_end_of_its_warm_up() -> None:
    """Its published code: lr epoch / 5, then 1e-6 + (lr - 1e-6) / 2 (1 + cos(pi (epoch - 5) /
    195)), at fractions of epochs.
    """
    epochs = [0.0, 2.5, 5.0, 5.1, 100.0, 199.9]
    expected = [
        *(1.2e-3 * epoch / 5 for epoch in epochs[:2]),
        *(
            1e-6 + (1.2e-3 - 1e-6) / 2 * (1 + math.cos(math.pi * (epoch - 5) / 195))
            for epoch in epochs[2:]
        ),
    ]
    asked = [round(10 * epoch) for epoch in epochs]
    assert rates(
        "imagenet.qkformer_10_384_bptt", epochs=200, epoch_steps=10, asked=asked
    ) == pytest.approx(expected)


@pytest.mark.parametrize("channels", [384, 512, 768])
def test_the_published_logs_of_qkformer_name_the_setting_that_they_are_of(channels: int) -> None:
    this = recipe_of(f"imagenet.qkformer_10_{channels}_bptt")
    assert dict(this.published_setting) == {
        "time_steps": 4,
        "model.over": "time",
        "model.projection_neuron": "over_samples",
    }
    assert (this.time_steps, this.value_of("model.over")) == (2, "step")
