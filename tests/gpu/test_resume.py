"""A run on a card that is killed and resumed ends with the bits of one that nobody touched."""

from pathlib import Path

import pytest

from tests.helpers.cards import device_of
from tests.helpers.driver import Driver
from tests.helpers.small import same_weights

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

RECIPE = """
from timm.optim import create_optimizer_v2
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.train.objective import CrossEntropy
from pipeline.recipe import Checkpointing, Recipe, spec
from pipeline.rules.sltt import SLTT
from pipeline.train.schedule import cosine

def recipe():
    return Recipe(
        name="killed",
        model=spec(nf_resnet18_small, classes=10, in_channels=3, width=16, blocks=(1, 1)),
        rule=spec(SLTT, k=2, rescale=True),
        data=spec(Synthetic, samples=2048, val_samples=64, shape=(3, 32, 32)),
        objective=spec(CrossEntropy),
        optimizer=spec(create_optimizer_v2, opt="sgd", lr=0.1, momentum=0.9),
        schedule=spec(cosine),
        time_steps=4,
        batch_size=32,
        epochs=2,
        checkpoints=Checkpointing(every=5),
        log_every=1,
    )
"""


def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    device_of("cuda")
    (tmp_path / "killed.py").write_text(RECIPE)
    how = ["launch", "killed.py", "--inline", "--device", "gpu"]
    untouched = Driver(
        *how, "--name", "untouched", run=tmp_path / "runs" / "untouched", folder=tmp_path
    )
    hit = Driver(*how, "--name", "hit", run=tmp_path / "runs" / "hit", folder=tmp_path)
    try:
        hit.at_step(40)
        hit.process.kill()
        hit.process.wait()
        assert untouched.end() == 0, untouched.log.read_text()[-3000:]
        again = Driver("resume", "hit", run=hit.run, folder=tmp_path)
        assert again.end() == 0, again.log.read_text()[-3000:]
    finally:
        untouched.kill()
        hit.kill()
    assert same_weights(untouched.run, hit.run)
