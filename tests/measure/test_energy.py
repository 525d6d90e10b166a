from dataclasses import replace

import pytest

from pipeline.measure.energy import FP16, TABLES, Inference, energy_j, in_words
from pipeline.measure.operations import Work


def test_a_published_pair() -> None:
    """Spikingformer-8-512 on ImageNet, T = 4 (Zhou et al. 2023, arXiv 2304.11954): 0.3473 G MAC and
    6.5175 G AC are 7.46 mJ.
    """
    assert energy_j(0.3473e9, 6.5175e9) * 1e3 == pytest.approx(7.46, abs=0.005)


def test_prices_are_the_published_ones_of_a_multiplication_and_an_addition() -> None:
    """In pJ (Horowitz 2014, figure 1.1.9): a MAC is both, an AC the addition alone."""
    published = {"fp32": (3.7, 0.9), "fp16": (1.1, 0.4), "int8": (0.2, 0.03)}
    for table, (multiplication, addition) in zip(TABLES, published.values(), strict=True):
        assert (table.mac_pj, table.ac_pj) == pytest.approx((multiplication + addition, addition))
    assert [table.name for table in TABLES] == [f"45 nm, {kind}" for kind in published]
    assert energy_j(1, 1, FP16) == pytest.approx(1.9e-12)


def test_an_addition_beside_a_multiplication_is_part_of_its_mac() -> None:
    inference = Inference(Work(multiplications=3, additions=10, dense=20), samples=2)
    assert (inference.macs, inference.acs) == (1.5, 3.5)
    told = inference.told()
    assert told["energy_j"] == pytest.approx(1.5 * 4.6e-12 + 3.5 * 0.9e-12)
    assert (
        told["prices"] == "45 nm, fp32"
        and told["energy_j_by_table"]["45 nm, fp32"] == told["energy_j"]
    )
    assert told["energy_j_by_table"]["45 nm, int8"] == pytest.approx(
        1.5 * 0.23e-12 + 3.5 * 0.03e-12
    )
    assert "measured_j" not in told
    told["energy_j"] = 1.43e-5
    assert (
        in_words(told, on_gpu=False)
        == "an inference: 14.3 µJ estimated (45 nm, fp32), not measured on a CPU"
    )
    assert (
        in_words(told, on_gpu=True)
        == "an inference: 14.3 µJ estimated (45 nm, fp32), not measured: no card told it"
    )
    told = {**replace(inference, not_counted=("fused",)).told(), "energy_j": 1.43e-5}
    assert (
        in_words(told, on_gpu=False)
        == "an inference: 14.3 µJ estimated (45 nm, fp32, without fused), not measured on a CPU"
    )
