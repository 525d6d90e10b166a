"""The benchmark of a GPU runs on a CPU, with a small network, and says that there is no GPU."""

import pytest

from benchmarks import gpu
from pipeline.recipe import spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from tests.helpers.small import small_recipe


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


def test_every_network_is_built_for_its_rules() -> None:
    for network in gpu.networks():
        assert network.recipe.precision == "bf16"
        assert all(rule.build().label for rule in network.rules)
