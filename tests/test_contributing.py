"""The examples of CONTRIBUTING.md, which a contributor copies first: they import, fit together, and the rule learns."""

import re
import sys
import types
from pathlib import Path

import torch

from pipeline.spiking.state import fresh_state
from tests.rules.small import batch, cross_entropy, learn, lif_network

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
NAMES = ("pipeline.rules.last_step", "pipeline.models.perceptron", "pipeline.data.digits", "recipes.digits.sltt")


def test_the_examples_run(monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), flags=re.DOTALL)
    modules = {}
    for name, block in zip(NAMES, blocks, strict=True):
        module = modules[name] = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(block, f"{CONTRIBUTING.name}: {name}", "exec"), module.__dict__)

    rule, model, (x_TBC, target) = modules[NAMES[0]].LastStep(), lif_network(), batch(3)
    rule.attach(model)
    assert len(learn(rule.objectives(model, x_TBC, cross_entropy(target)))) == 3
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())

    recipe = modules[NAMES[3]].recipe()
    network, digits = recipe.model.build(), recipe.data.build()
    recipe.rule.build().attach(network)
    with fresh_state(network):
        assert network(torch.rand(2, 3, 1, 8, 8)).shape == (2, 3, 10)
    assert digits.fingerprint() == recipe.data.build().fingerprint()
