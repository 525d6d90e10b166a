"""Checkpoints that are whole or not there: written beside training, checksums last; verified before anything is loaded.

    step_00000120/
        deepspeed/ | plain/     weights and optimizer state, as the backend has them; under ZeRO-1 and -2 a part of each rank
        model.safetensors       the weights alone, for evaluation and publication, without the backend
        rule.pt                 the rule's own state, where it has any
        rng_rank0.pt ...        random number generators of each rank, and its own running statistics
        trainer.json            step, data position, run ids, recipe, totals
        manifest.json           sizes and sha256 of all of these, written last

The newest one that verifies counts, whatever any scheduler's own list of checkpoints says. A damaged one is moved to
`quarantine/` by name and the one before it is used.

In reading order: `checkpoints` saves and restores, `background` is the thread that writes, `place` and what implements it
(`folder`, `store`) is where they are kept, `owner` whose that is, `fetched` where what comes from a bucket lies,
`address` what its name may hold, `sealed` the manifest, `random_state` what a rank draws from, `lost` what the journal knows of
one that is nowhere, `shared` whether all ranks see one place.
"""

from pipeline.checkpoint.address import absolute, refuse_credentials
from pipeline.checkpoint.checkpoints import WEIGHTS, Checkpoints, Saved, weights_of
from pipeline.checkpoint.folder import Folder, pin, step_folders
from pipeline.checkpoint.lost import lost_step
from pipeline.checkpoint.owner import Owned, claim, owner_of
from pipeline.checkpoint.place import CheckpointError, Place, newest, read_trainer, step_name, verified
from pipeline.checkpoint.random_state import rng_state, set_rng_state
from pipeline.checkpoint.sealed import damage
from pipeline.checkpoint.shared import check_shared
from pipeline.checkpoint.store import place_at

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
    "verified",
    "weights_of",
]
