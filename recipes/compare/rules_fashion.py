"""Every rule on Fashion-MNIST in short runs: one study and one table for each kind of network.

Command:  spiketrain launch recipes/compare/rules_fashion.py --workers 2
          spiketrain resume rules-fashion-DATE-TIME      (after a stop)
Source:   the rules as their own recipes in recipes/fashion name them; the networks are small ones
          of ours.
Result:   saved bytes, of BPTT's: SLTT and OTTT .70, OPZO and DFA 1.18, DSR .20, IDE and SPIDE .27;
          21 min, commit 9398500b0cc0, AMD EPYC. Accuracies: docs/results.md, "All rules in one
          launch".

Within a study only the rule differs, learning rate included. Each study has its own BPTT row.
Accuracies are of two epochs; recipes/fashion has each rule at its best.
"""

from collections.abc import Iterator
from dataclasses import replace

from pipeline.recipe import Evaluation, Recipe, Spec, spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.ide import IDE
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from recipes.fashion.base import fashion
from recipes.fashion.dsr_if import recipe as dsr_if
from recipes.fashion.opzo import recipe as opzo
from recipes.fashion.spide import recipe as spide

FEED_FORWARD = {
    "bptt": spec(BPTT),
    "bptt-recompute": spec(BPTT, recompute=True),
    "sltt": spec(SLTT),
    "sltt-1": spec(SLTT, k=1, rescale=True),
    "ottt-a": spec(OTTT),
    "ottt-o": spec(OTTT, update="step"),
    "opzo": spec(OPZO),
    "dfa": spec(OPZO, feedback="random"),
}


def recipe() -> list[Recipe]:
    # OPZO's settings, Adam among them: a learning rate under which gradients of very different size
    # learn.
    feed_forward = replace(
        opzo(), model=fashion().model.with_(neuron=opzo().model.kwargs["network"].kwargs["neuron"])
    )
    feedback = spide()
    return [
        *_study("feed-forward", feed_forward, FEED_FORWARD),
        *_study("rates", dsr_if(), {"bptt": spec(BPTT), "dsr": spec(DSR)}),
        *_study(
            "feedback", feedback, {"bptt": spec(BPTT), "ide": spec(IDE), "spide": feedback.rule}
        ),
    ]


def _study(name: str, shared: Recipe, rules: dict[str, Spec]) -> Iterator[Recipe]:
    for rule_name, rule in rules.items():
        yield replace(
            shared,
            name=f"rules-{name}-{rule_name}",
            rule=rule,
            epochs=2,
            evaluation=Evaluation(every=0),
        )
