"""On which batches of an attempt, or samples of an evaluation, that is measured which would cost
too much on all; without torch, so that reports can read it.

Batches are counted from the attempt's first, 0, which warms up, and steps from the run's. In the
place of one that is skipped stands the next that is not.

The names of what a run's seconds are charged to; without torch, so that reports can read them at
once.
"""

from __future__ import annotations

MEMORY_EVERY = 200
"""bytes that backward keeps alive, and states: on batch 1, and every so many from there"""
OPERATIONS_EVERY = 1000
"""operations: at step 2, and every so many from there"""
ACTIVITY_EVERY = 8
"""spikes, neuron by neuron: on one in so many samples of an evaluation, drawn by their ids"""


PARTS = (
    "data_wait",
    "transfer",
    "teacher",
    "forward",
    "backward",
    "communication",
    "optimizer",
    "metrics",
)
"""of a batch: data_wait, for the loader; transfer to the device, mixing and encoding there;
forward, what a rule does before it yields an objective; backward, differentiating it, and what a
rule learns by itself; communication, all collectives, and so the wait for the slowest rank;
optimizer, the move of the weights and the schedule; metrics, adding up loss and hits, and what the
guard copies before a batch and looks at before the weights move"""
BETWEEN = ("evaluation", "checkpoint", "tracking", "fidelity", "coordination", "skipped")
"""between batches, in seconds of the host; coordination: what ranks agree on after each batch, and
reading the meters, which on a GPU is partly a wait for kernels that their batch is charged with;
skipped: batches that were left in the middle, whole"""
REST = "rest"
