"""Checkpoints: written while training goes on, the manifest last, and verified before a load.

    step_00000120/
        deepspeed/ | plain/     weights and optimizer state; with ZeRO a part of each rank
        model.safetensors       the weights alone, for evaluation and publication
        rule.pt                 the rule's own state, if it has any
        rng_rank0.pt ...        each rank's random number generators and own running statistics
        trainer.json            step, data position, run ids, recipe, totals
        manifest.json           sizes and sha256 of all of these

The newest checkpoint that verifies is used, regardless of a scheduler's own list. A damaged
checkpoint is moved to `quarantine/`, and the previous one is used.

In reading order: `checkpoints` saves and restores, `background` is the thread that writes, `store`
is a folder or an address of checkpoints and its owner, `choose` selects a checkpoint, and
`manifest` detects damage.
"""

from pipeline.train.checkpoint.background import Saved
from pipeline.train.checkpoint.checkpoints import (
    WEIGHTS,
    Checkpoints,
    read_trainer,
    rng_state,
    set_rng_state,
    weights_of,
)
from pipeline.train.checkpoint.manifest import damage
from pipeline.train.checkpoint.selection import lost_step, pin, prune, step_name, verified
from pipeline.train.checkpoint.store import (
    CheckpointError,
    CheckpointStore,
    Owner,
    absolute,
    claim,
    folder_of,
    owner_of,
    refuse_credentials,
    step_folders,
    store_at,
    trainer_of,
)

__all__ = [
    "WEIGHTS",
    "CheckpointError",
    "CheckpointStore",
    "Checkpoints",
    "Owner",
    "Saved",
    "absolute",
    "claim",
    "damage",
    "folder_of",
    "lost_step",
    "owner_of",
    "pin",
    "prune",
    "read_trainer",
    "refuse_credentials",
    "rng_state",
    "set_rng_state",
    "step_folders",
    "step_name",
    "store_at",
    "trainer_of",
    "verified",
    "weights_of",
]
