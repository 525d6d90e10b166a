"""The benchmark of a GPU runs on a CPU, with a small network, and says that there is no GPU."""

from unittest.mock import Mock

import pytest
import torch

from benchmarks import gpu
from pipeline.forecast.bench import DoesNotFit
from pipeline.recipe import spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from tests.helpers.small import small_recipe


def test_without_a_gpu_it_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu"])
    gpu.main()
    said = capsys.readouterr().out
    assert said == "benchmarks.gpu needs an NVIDIA GPU that torch can use: none\n"


def test_a_small_network_has_its_rows_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    network = gpu.Network("small", small_recipe(), {spec(BPTT): 7.0, spec(SLTT): None})
    gpu.report([network], images=4, batches=2, neurons=4096)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line[:1] == ["small"]]
    assert [row[1:3] for row in rows] == [
        ["BPTT", "auto"], ["BPTT", "eager"], ["SLTT", "auto"], ["SLTT", "eager"]
    ]  # fmt: skip
    assert [row[3:5] == [">=", "7"] for row in rows] == [True, False, False, False]
    assert all(float(row[-4].replace(",", "")) > 0 for row in rows)
    assert [line[0] for line in lines].count("LIF,") == 2


def test_a_batch_that_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "speed", Mock(side_effect=DoesNotFit))
    network = gpu.Network("small", small_recipe(), {spec(BPTT): None})
    gpu.report([network], images=4, batches=2, neurons=4096)
    assert capsys.readouterr().out.count("does not fit") == 2


def test_every_network_is_built_for_its_rules() -> None:
    for network in gpu.networks():
        assert network.recipe.precision == "bf16"
        assert all(rule.build().label for rule in network.rules)


def test_the_time_is_that_of_one_call() -> None:
    calls: list[None] = []
    assert gpu.seconds(lambda: calls.append(None), 3, torch.device("cpu")) > 0 and len(calls) == 3
