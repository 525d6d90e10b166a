"""Checkpoints: written beside training, the manifest last, and verified before they are loaded.

    step_00000120/
        deepspeed/ | plain/     weights and optimizer state; with ZeRO a part of each rank
        model.safetensors       the weights alone, for evaluation and publication
        rule.pt                 the rule's own state, where it has any
        rng_rank0.pt ...        each rank's random number generators and own running statistics
        trainer.json            step, data position, run ids, recipe, totals
        manifest.json           sizes and sha256 of all of these

The newest one that verifies counts, whatever a scheduler's own list says. A damaged one is moved to
`quarantine/`, and the one before it is used.

In reading order: `checkpoints` saves and restores, `background` is the thread that writes, `place`
is what every place of checkpoints can do, `folder` and `store` are the two kinds, `owner` guards
one outside of the run's folder, `address` checks its address, `sealed` is the manifest and
`random_state` the generators.
"""

from pipeline.train.checkpoint.address import absolute, refuse_credentials
from pipeline.train.checkpoint.background import Saved
from pipeline.train.checkpoint.checkpoints import WEIGHTS, Checkpoints, weights_of
from pipeline.train.checkpoint.folder import Folder, check_shared, pin, step_folders
from pipeline.train.checkpoint.manifest import damage
from pipeline.train.checkpoint.owner import Owned, claim, owner_of
from pipeline.train.checkpoint.place import (
    CheckpointError,
    Place,
    lost_step,
    newest,
    read_trainer,
    step_name,
    trainer_of,
    verified,
)
from pipeline.train.checkpoint.random_state import rng_state, set_rng_state
from pipeline.train.checkpoint.store import place_at

__all__ = [
    "WEIGHTS",
    "CheckpointError",
    "Checkpoints",
    "Folder",
    "Owned",
    "Place",
    "Saved",
    "absolute",
    "check_shared",
    "claim",
    "damage",
    "lost_step",
    "newest",
    "owner_of",
    "pin",
    "place_at",
    "read_trainer",
    "refuse_credentials",
    "rng_state",
    "set_rng_state",
    "step_folders",
    "step_name",
    "trainer_of",
    "verified",
    "weights_of",
]
