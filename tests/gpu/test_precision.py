"""fp32 is IEEE single precision in products and in convolutions, and TF32 is what it says."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.nn import functional as F

from pipeline.launch.driver import Inline
from tests.helpers.cards import device_of
from tests.helpers.small import events, make_run, small_recipe

pytestmark = pytest.mark.gpu

# fp32 holds it exactly; TF32, with 10 bits of mantissa, rounds it to 1.
NEAR_ONE = 1 + 2**-12


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_products_and_convolutions_are_computed_as_a_run_tells(
    precision: Literal["fp32", "tf32"], tmp_path: Path
) -> None:
    on = device_of("cuda")
    job = make_run(tmp_path / "run", small_recipe(precision=precision, stop_after=1))
    with Inline(device="gpu") as launcher:
        launcher.run(job, "test")
    [start] = events(tmp_path / "run", "start")
    assert start["precision"] == precision
    # What follows is computed in this process, as the run has left it.
    expected = NEAR_ONE if precision == "fp32" else 1.0
    one = torch.eye(512, device=on)
    assert float((one * NEAR_ONE @ one).diagonal().mean()) == expected
    x_BCHW = torch.full((16, 64, 32, 32), NEAR_ONE, device=on)
    hand_on = torch.eye(64, device=on)[:, :, None, None]  # each channel as it is
    assert float(F.conv2d(x_BCHW, hand_on).mean(dtype=torch.float64)) == expected
