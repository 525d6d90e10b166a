"""The examples of CONTRIBUTING.md, which a contributor copies first: they import, fit together, and
the rule learns.
"""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from pipeline.data.base import Data
from pipeline.spiking.state import fresh_state
from tests.rules.small import batch, cross_entropy, learn, lif_network

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
NAMES = (
    "pipeline.rules.last_step",
    "pipeline.models.perceptron",
    "pipeline.data.datasets.digits",
    "recipes.digits.sltt",
)


@pytest.fixture
def modules(monkeypatch) -> list[types.ModuleType]:
    """As if each example had been saved under its name."""
    blocks = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), flags=re.DOTALL)
    made = []
    for name, block in zip(NAMES, blocks, strict=True):
        made.append(types.ModuleType(name))
        monkeypatch.setitem(sys.modules, name, made[-1])
        exec(compile(block, f"{CONTRIBUTING.name}: {name}", "exec"), made[-1].__dict__)
    return made


def test_the_examples_run(modules):
    rule, model, (x_TBC, target) = modules[0].LastStep(), lif_network(), batch(3)
    rule.attach(model)
    assert len(learn(rule.loss_terms(model, x_TBC, cross_entropy(target)))) == 3
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in model.parameters()
    )

    recipe = modules[3].recipe()
    network = recipe.model.build()
    recipe.rule.build().attach(network)
    with fresh_state(network):
        assert network(torch.rand(2, 3, 1, 8, 8)).shape == (2, 3, 10)


def test_its_data_source_gives_every_sample_once(modules):
    digits = modules[3].recipe().data.build()
    assert isinstance(digits, Data)
    digits.check()
    x_NP, target_N = load_digits(return_X_y=True)
    trained = [
        digits.train(seed=1, rank=rank, world=2, batch_size=60, micro_batch=15, threads=1)
        for rank in range(2)
    ]
    evaluated = [digits.val(rank=rank, world=2, micro_batch=40, threads=1) for rank in range(2)]
    assert [each.steps_per_epoch for each in trained] == [1500 // 60] * 2
    for loaders, first, count in ((trained, 0, 1500), (evaluated, 1500, 297)):
        seen = []
        for loader in loaders:
            with loader.epoch(0) as batches:
                for each in batches:
                    row_B = first + each.index.numpy()
                    assert each.x.shape[1:] == digits.shape and each.x.dtype == torch.float32
                    assert ((each.x.flatten(1) + 1) * 8).numpy() == pytest.approx(x_NP[row_B])
                    assert each.target.tolist() == target_N[row_B].tolist()
                    seen += each.index.tolist()
        assert sorted(seen) == list(range(count))
    with trained[0].epoch(0, start=60) as later, trained[0].epoch(0) as whole:
        assert len(list(later)) == len(list(whole)) - 2  # of 15 samples on either rank
    for loader in (*trained, *evaluated):
        loader.close()


def test_its_fingerprint_is_of_the_content(modules):
    digits, (x_NP, target_N) = modules[3].recipe().data.build(), load_digits(return_X_y=True)
    found = digits.fingerprint()
    x_NP[7, 9] += 1
    modules[2].load_digits = lambda return_X_y: (x_NP, target_N)
    assert digits.fingerprint() != found
