"""BPTT, SLTT and SLTT-1 on one spiking network and the same batches of Fashion-MNIST, then a table.

Command:  spiketrain launch recipes/compare/fashion_demo.py --workers 2   (`make demo` sets up, too)
          spiketrain resume fashion-demo-DATE-TIME      (after a stop)
Source:   the rules as in Meng et al. 2023 (SLTT), arXiv:2302.14311; the network is a small one of
          ours.
Result:   on a held-out tenth (`--set data.held_out=0.1`), top-1 of BPTT 0.8962, SLTT 0.8967, SLTT-1
          0.8965; saved bytes of SLTT and SLTT-1 0.30 of BPTT's; one seed, one worker, commit
          3760183cc3f1, AMD EPYC with other work beside it: no times.

SLTT-1 differentiates one random time step of six, and `rescale` multiplies its gradient by six. The
published rule is not rescaled: under SGD that is a sixth of the learning rate. SLTT calls the
network once per time step, which has a fixed cost, so each of two workers holds 128 images.
"""

from dataclasses import replace

from pipeline.recipe import Evaluation, Suite, spec
from pipeline.recipe.suite import Measurement
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from recipes.fashion.base import fashion

SWEPT = (2, 6, 12)  # numbers of time steps


def recipe() -> Suite:
    rules = {"bptt": spec(BPTT), "sltt": spec(SLTT), "sltt-1": spec(SLTT, k=1, rescale=True)}
    study = fashion()
    # Half the study's learning rate: SLTT-1 has to bear it times six.
    shared = replace(
        study,
        optimizer=study.optimizer.with_(lr=0.3),
        time_steps=6,
        batch_size=256,
        epochs=4,
        evaluation=Evaluation(every=1),
    )
    runs = [replace(shared, name=f"fashion-demo-{name}", rule=rule) for name, rule in rules.items()]
    by_steps = replace(shared, name="fashion-demo-by-steps", rule=spec(BPTT, chunk=1))
    swept = (*(each.name for each in runs), by_steps)
    return Suite(
        recipes=tuple(runs),
        measurements=(Measurement("by-t", "sweep", swept, {"steps": SWEPT}),),
    )
