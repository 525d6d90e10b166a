"""Checkpoints of a run. They are written during training and verified before they are loaded.

    step_00000120/
        deepspeed/ | plain/     weights and optimizer state; ZeRO writes a file for each rank
        model.safetensors       the weights that are evaluated and published
        rule.pt                 the rule's state, if it has any
        buffers_rank0.pt ...    each rank's own buffers, if there are several ranks
        trainer.json            step, data position, run ids, recipe, totals
        manifest.json           size and sha256 of each file above; written last

A run continues from the newest checkpoint that verifies. A damaged checkpoint is moved to
`quarantine/`, and the previous one is tried.

The modules, in reading order: `checkpoints` saves and restores, and writes in a thread, `store`
keeps checkpoints in a folder or at an address and checks their owner, `selection` selects a
checkpoint, and `manifest` detects damage.
"""

from pipeline.train.checkpoint.checkpoints import (
    WEIGHTS,
    Checkpoints,
    SavedCheckpoint,
    read_trainer,
    weights_of,
)
from pipeline.train.checkpoint.manifest import find_damage
from pipeline.train.checkpoint.selection import (
    expected_step,
    pin,
    prune,
    step_name,
    verified_checkpoint,
)
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
    "SavedCheckpoint",
    "absolute",
    "claim",
    "expected_step",
    "find_damage",
    "folder_of",
    "owner_of",
    "pin",
    "prune",
    "read_trainer",
    "refuse_credentials",
    "step_folders",
    "step_name",
    "store_at",
    "trainer_of",
    "verified_checkpoint",
    "weights_of",
]
