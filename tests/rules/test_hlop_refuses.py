"""What HLOP does not train, in one line each."""

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.data.datasets.tasks import Permuted
from pipeline.models.mlp import mlp
from pipeline.recipe.recipe import Phase, Recipe, spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.hlop import HLOP
from pipeline.rules.ide import IDE
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.equilibrium import Equilibrium
from pipeline.spiking.limit import SpectralLimit
from pipeline.spiking.neuron import IF, LIF
from pipeline.spiking.synapse import Conv2d, Linear
from pipeline.train.build import check_recipe
from tests.helpers.rule_networks import batch, lif_network
from tests.helpers.small import small_recipe
from tests.rules.test_hlop import ROWS, train


def sgd(**more: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, **more)  # type: ignore[arg-type]


def attached(rule: HLOP, model: nn.Module | None = None, **more: Any) -> HLOP:
    rule.attach(lif_network() if model is None else model, **more)
    return rule


def network_with(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(Linear(6, 8), LIF(), *modules)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: HLOP(HLOP(SLTT(), rows=ROWS), rows=ROWS),
            r"HLOP: inner must be a rule other than HLOP",
        ),
        (
            lambda: HLOP(SLTT(), rows=(3, 4, 3)),
            r"HLOP: rows must hold, for each task, .* got rows=\(3, 4, 3\)",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS, learning_rate=0.0),
            r"HLOP: learning_rate must be numbers > 0; got learning_rate=0\.0",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS, inner_iterations=0),
            r"HLOP: inner_iterations must be a whole number >= 1",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS, momentum=1.0),
            r"HLOP: momentum must be in 0\.\.1, below 1; got momentum=1\.0",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS, lateral_steps=0),
            r"HLOP: lateral_steps must be a whole number >= 1; got lateral_steps=0",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS, learn_from="all"),
            r"HLOP: learn_from must be 'spikes', 'traces' or 'rates'; got learn_from='all'",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS, error="fa"),
            r"HLOP: error must be 'backprop', .* or 'feedback'; got error='fa'",
        ),
        (
            lambda: HLOP(OPZO(), rows=ROWS, error="feedback"),
            r"OPZO hands no error from layer to layer, .*; got error='feedback'",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=((3, 4),))),
            r"HLOP\(SLTT\): rows must name one for each of 0, 2, 4; got \(3, 4\)",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS, learning_rate=(1, 2))),
            r"HLOP\(SLTT\): learning_rate must name one for each",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=((7, 4, 3), (4, 1, 1)))),
            r"HLOP\(SLTT\): rows must fit into the 6 inputs of 0; got 7",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS, learn_from="rates").check_steps(4),
            (
                r"HLOP\(SLTT\): learn_from='rates' needs a rule that gives all T steps to the model"
                r" at once; SLTT gives 1 of 4"
            ),
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS, skip=("5",))),
            r"HLOP\(SLTT\): skip must name modules of the model; got '5'",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS, learn_from="traces")),
            r"needs a rule that keeps traces, .*; got SLTT",
        ),
        (lambda: attached(HLOP(SLTT(), rows=ROWS), over_time="mean"), r"over_time must be 'steps'"),
        (
            lambda: attached(
                HLOP(BPTT(), rows=((3, 4),), learn_from="rates"),
                nn.Sequential(Linear(6, 5), Linear(5, 3)),
            ),
            (
                r"HLOP\(BPTT\): the model must have LIF neurons, whose decay traces and rates"
                r" share;"
                r" got Sequential"
            ),
        ),
        (
            lambda: attached(
                HLOP(SLTT(), rows=ROWS), network_with(Linear(8, 3, weights="standardized"))
            ),
            (
                r"HLOP\(SLTT\): every layer must be a plain Linear or Conv2d, .* got standardized"
                r" weights at 2"
            ),
        ),
        (
            lambda: attached(
                HLOP(SLTT(), rows=ROWS),
                network_with(nn.utils.parametrizations.weight_norm(Linear(8, 3))),
            ),
            r"got parametrised weights at 2",
        ),
        (
            lambda: attached(
                HLOP(SLTT(), rows=ROWS), network_with(SpectralLimit(Linear(8, 8, False)))
            ),
            r"got SpectralLimit, .* at 2",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS), network_with(Conv2d(4, 4, 3, groups=2))),
            r"got groups=2 at 2",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS), network_with(nn.Linear(8, 3))),
            r"got torch's Linear at 2",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS), network_with(nn.BatchNorm1d(8))),
            r"got BatchNorm1d, which cannot be frozen .* at 2",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS), network_with(nn.Bilinear(8, 8, 3))),
            r"every matrix must be .*; got 2\.weight",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS), LIF()),
            r"the model must have synapses, .*; got none",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS)).start_task(nn.Module(), 2),
            r"one after another; got task 2 after task 0",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS).check_optimizer(
                torch.optim.Adam([nn.Parameter(torch.ones(1))])
            ),
            (
                r"HLOP\(SLTT\): the optimizer must be SGD, whose steps are sums of projected"
                r" gradients; got Adam"
            ),
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS).check_optimizer(sgd(weight_decay=1e-4)),
            (
                r"HLOP\(SLTT\): weight_decay must be 0, because it also shrinks .*; got"
                r" weight_decay=0\.0001"
            ),
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_slices_where_rates_are_asked_for_and_more_rows_than_there_is_room():
    rule, model = (
        HLOP(BPTT(chunk=1), rows=((5, 1, 1), (1, 1, 1)), learn_from="rates"),
        lif_network(),
    )
    rule.attach(model)
    with pytest.raises(
        ValueError,
        match=(
            r"HLOP\(BPTT-chunk-1\): learn_from='rates' needs .* all T steps .*; BPTT-chunk-1 gives"
            r" 1 of 4"
        ),
    ):
        train(rule, model, *batch(4), step=0)
    rule.start_task(model, 1)
    with pytest.raises(
        ValueError, match=r"got 1 more for task 2, where synapse 0 has 0 directions left"
    ):
        rule.start_task(model, 2)


def test_a_refused_model_is_free_again():
    model = lif_network()
    with pytest.raises(ValueError, match="traces"):
        HLOP(SLTT(), rows=ROWS, learn_from="traces").attach(model)
    BPTT().attach(model)


def test_sgd_of_every_kind_is_welcome():
    for optimizer in (sgd(), sgd(momentum=0.9), sgd(momentum=0.9, nesterov=True)):
        HLOP(SLTT(), rows=ROWS).check_optimizer(optimizer)


def test_labels_are_distinct():
    made = [
        HLOP(SLTT(), rows=ROWS),
        HLOP(SLTT(), rows=ROWS, lateral_steps=40),
        HLOP(OTTT(), rows=ROWS, error="sign_symmetric"),
    ]
    assert [rule.label for rule in made] == [
        "HLOP(SLTT)",
        "HLOP(SLTT, spiking)",
        "HLOP(OTTT-A, sign-symmetric)",
    ]
    assert [rule.memory for rule in made] == ["constant"] * 3 and HLOP(
        OTTT(update="step"), rows=ROWS
    ).update == "step"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer.weight_decay": 1e-4},
            r"HLOP\(SLTT\): weight_decay must be 0, .*; got weight_decay=0\.0001",
        ),
        ({"optimizer.opt": "adam"}, r"HLOP\(SLTT\): the optimizer must be SGD, .*; got Adam"),
        ({"optimizer.opt": "lamb"}, r"HLOP\(SLTT\): the optimizer must be SGD, .*; got Lamb"),
        (
            {"model.weights": "standardized"},
            r"HLOP\(SLTT\): every layer must be a plain .*; got standardized weights at layers\.0",
        ),
        (
            {"rule.rows": ((3, 8), (1, 2))},
            r"rows of all 2 tasks must fit into the 8 inputs of classifier; got 10",
        ),
    ],
)
def test_a_recipe_is_refused_before_anything_is_launched(changes, message):
    recipe = small_recipe(
        model=spec(mlp, in_features=64, hidden=(8,)),
        rule=spec(HLOP, inner=spec(SLTT), rows=((3, 2), (1, 1))),
        phases=tuple(
            Phase(name=f"order-{task}", data=spec(Permuted, task=task)) for task in range(2)
        ),
    ).override({"optimizer.weight_decay": 0.0})
    assert Recipe.from_json(recipe.to_json()) == recipe
    check_recipe(recipe, 1)
    with pytest.raises(ValueError, match=message):
        check_recipe(recipe.override(changes), 1)


def test_a_recipe_of_one_task_has_nothing_to_protect():
    recipe = small_recipe(
        model=spec(mlp, in_features=64, hidden=(8,)),
        rule=spec(HLOP, inner=spec(SLTT), rows=((3, 2),)),
    )
    with pytest.raises(
        ValueError, match=r"HLOP\(SLTT\): .* a recipe must have 2 phases or more; got 1"
    ):
        check_recipe(recipe.override({"optimizer.weight_decay": 0.0}), 1)


def test_rates_of_an_equilibrium_are_not_heard():
    feedback = Linear(4, 4, bias=False)
    model = nn.Sequential(
        Equilibrium(inject=Linear(6, 4), feedback=feedback, neurons=[IF()], synapses=[]),
        Linear(4, 3),
    )
    rule = HLOP(IDE(), rows=((1, 1, 1),), learn_from="rates")
    with pytest.raises(
        ValueError,
        match=r"HLOP\(IDE\): an equilibrium is run one step at a time, so learn_from must not be",
    ):
        rule.attach(model, over_time="mean")


def test_rows_must_fit_all_tasks_that_come():
    model = mlp(3, in_features=6, hidden=(8, 7), bias=False)
    rule = HLOP(SLTT(), rows=((2, 2, 2), (1, 1, 1)))
    rule.attach(model)
    rule.check_tasks(model, 5)
    with pytest.raises(
        ValueError,
        match=r"HLOP\(SLTT\): rows of all 6 tasks must fit into the 6 inputs of layers\.0; got 7",
    ):
        rule.check_tasks(model, 6)
