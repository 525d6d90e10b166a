"""Every rule on Fashion-MNIST, one study for each kind of network, a table for each; short runs, to
see what each rule costs.

Command:  spiketrain launch recipes/compare/rules_fashion.py --workers 2; stopped, it goes on with:
          spiketrain resume rules-fashion-DATE-TIME, whose tables so far spiketrain compare
          rules-fashion-DATE-TIME prints
Source:   the rules as their own recipes in recipes/fashion name them; the networks are small ones
          of ours.
Result:   its three tables in 20 minutes, on two workers of one core each of an AMD EPYC, much other
          work beside it; commit 4e0722d9b5a2. Top-1 on the 10,000 test images and saved bytes as a
          share of BPTT's row:
            feed-forward  BPTT .8874; recomputed .8853, .74; SLTT .8878, .52; SLTT-1 .8854, .52;
                          OTTT-A .8861, .52; OTTT-O .8958, .52; OPZO .8636, .54; DFA .8218, .54
            rates         BPTT .7854; DSR .8878, .42
            feedback      BPTT .8580; IDE .8602, .23; SPIDE .8596, .23
Within a study only the rule differs, learning rate included, and each study has its own BPTT row:
nothing is divided across studies. The accuracies are those of two epochs with one learning rate for
all; those of the rules at their best stand in recipes/fashion.
"""

from __future__ import annotations

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
