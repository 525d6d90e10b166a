"""`spiketrain new`: a first recipe, with a comment on each choice."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import TRAIN, Commands, example
from pipeline.core.checks import require
from pipeline.core.printing import new_console, say_next

_DATA = Path("data/fashion")
_RECIPE = '''"""A spiking network on Fashion-MNIST. Change the values below, and launch this file.

Data:     spiketrain write fashion --out data/fashion
Train:    spiketrain launch NAME.py --workers 2
Results:  spiketrain compare

The number of workers is an option of the launch. A worker is a process that trains on its share of
each batch: on a CPU one for each core, on a machine with GPUs one for each GPU. The results do not
depend on it, except for rounding.
"""

from timm.optim import create_optimizer_v2

from pipeline.data.datasets.beton import Beton
from pipeline.models.vgg import vgg_sws
from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine


def recipe() -> Recipe:
    # spec(PART, keyword=value) names a part and its arguments. It is built when the run starts.
    return Recipe(
        # The name is the first part of the names of this recipe's runs.
        name="NAME",
        # Network: any torch module that maps [T,B,...] to logits [T,B,classes]. This one has one
        # convolution with 32, 64 and 128 channels in each stage. pipeline.models has others, and
        # spec(wrap, ...) takes networks of SpikingJelly, snnTorch and norse.
        model=spec(
            vgg_sws,
            classes=10,
            in_channels=1,  # of the pictures: 1 for grey, 3 for colour
            stages=((32,), (64,), (128,)),
            stem=(5, 2),  # the first convolution: 5 x 5 pixels, stride 2
            neuron=spec(LIF, decay=0.5),  # the share of the membrane that a time step keeps
        ),
        # Rule: how gradients are computed. SLTT keeps one time step in memory. BPTT, the baseline,
        # keeps all of them: from pipeline.rules.bptt import BPTT. Also OTTT, DSR, IDE, OPZO ...
        # To compare rules, return a list of recipes that differ in the name and the rule.
        rule=spec(SLTT),
        # Data: FFCV files in a folder. For your own pictures: spiketrain write folder, then
        # channels=3, another size, crop="resized", and no mean and std.
        data=spec(
            Beton,
            folder="data/fashion",
            classes=10,
            channels=1,
            size=28,  # pixels a side
            crop="shift",
            reach=0,  # pixels by which a training picture is shifted at random
            mean=(0.286,),  # of the pixels, scaled to 0..1, and their standard deviation
            std=(0.353,),
        ),
        # Loss of the logits and the classes, at each time step.
        objective=spec(CrossEntropy),
        # Optimizer: timm's names, such as momentum or adamw. lr is the highest learning rate.
        optimizer=spec(create_optimizer_v2, opt="momentum", lr=0.3, momentum=0.9, weight_decay=0.0),
        # The learning rate rises during the first 5 % of the run, and falls to 0 until its end.
        schedule=spec(cosine, warmup=0.05),
        # Time steps T that each picture is shown for. Time grows with T, and BPTT's memory, too.
        time_steps=4,
        # Batch size: the pictures of all workers in one step of the optimizer.
        batch_size=128,
        # Epochs: how often each picture is trained on.
        epochs=10,
        # Seed of the initial weights, the order of the pictures and their augmentation.
        seed=0,
    )
'''
commands = Commands()


@commands.command(rich_help_panel=TRAIN, epilog=example("spiketrain new mine"))
def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="name of the recipe, and of its file NAME.py")
    ],
) -> None:
    """Write a recipe to start from, with a comment on each choice."""
    require(
        name.isidentifier(),
        f"new: NAME must have only letters, digits and _, no digit first; got {name}",
    )
    file = Path(f"{name}.py")
    require(not file.exists(), f"new: {file} must not exist yet; it does: choose another name")
    file.write_text(_RECIPE.replace("NAME", name))
    console = new_console()
    console.print(f"{file} trains on Fashion-MNIST as it stands; its comments say what to change")
    commands = [] if _DATA.exists() else [f"spiketrain write fashion --out {_DATA}"]
    say_next(console, [*commands, f"spiketrain launch {file} --workers 2"])
