"""The memory of a card: a batch that does not fit is halved, and what SLTT takes does not grow with
the number of time steps.
"""

# T time, B batch

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.data.datasets.synthetic import Synthetic
from pipeline.launch.driver import Inline
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.recipe.recipe import spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.train.objective import CrossEntropy
from tests.helpers.cards import device_of
from tests.helpers.small import events, make_run, small_recipe

pytestmark = pytest.mark.gpu


@pytest.fixture
def little_memory() -> Iterator[None]:
    device_of("cuda")
    torch.cuda.set_per_process_memory_fraction(0.05)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("little_memory")
def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path) -> None:
    """BPTT keeps 18.5 GB of 256 such images at T = 8: more than a twentieth of a card of 370 GB or
    less.
    """
    recipe = small_recipe(
        model=spec(nf_resnet18_small, classes=10, in_channels=3, width=64, blocks=(1, 1)),
        rule=spec(BPTT),
        data=spec(Synthetic, samples=512, val_samples=32, shape=(3, 64, 64)),
        time_steps=8,
        batch_size=256,
        stop_after=2,
        epochs=1,
        backend="deepspeed",
    )
    with Inline(device="gpu") as launcher:
        assert launcher.run(make_run(tmp_path / "run", recipe), "test") is not None
    sizes = [event["micro_batch"] for event in events(tmp_path / "run", "smaller")]
    assert sizes and sizes == [256 // 2**n for n in range(1, len(sizes) + 1)]


def test_slTT_takes_as_much_for_many_time_steps_as_for_few() -> None:
    assert 1.05 * _peak_bytes(4) > _peak_bytes(32)


def _peak_bytes(steps: int) -> int:
    on, rule = device_of("cuda"), SLTT()
    network = nf_resnet18_small(classes=10, in_channels=3, width=32, blocks=(1, 1)).to(on)
    rule.attach(network)
    x_TB = torch.rand(1, 16, 3, 32, 32, device=on).expand(steps, -1, -1, -1, -1)
    target_B = torch.zeros(16, dtype=torch.long, device=on)
    before = 0
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for objective in rule.loss_terms(network, x_TB, CrossEntropy()(target_B), step=0):
            if objective.backward is not None:
                objective.backward.backward()
            del objective
        rule.end_of_batch()
    return torch.cuda.max_memory_allocated() - before
