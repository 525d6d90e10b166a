"""Names of the parts of a run's time, and how often the costly quantities are measured.

This module does not import torch, so that reports can read it at once.
"""

from typing import Literal, get_args

# Parts of a batch:
#   data_wait      waiting for the loader
#   transfer       copying to the device; mixing and encoding there
#   teacher        the teacher's answers
#   forward        what a rule does before it yields a loss term
#   backward       differentiating the loss terms, and learning inside the rule
#   communication  all collectives, with the wait for the slowest rank
#   optimizer      updating the weights and the schedule
#   metrics        summing loss and hits; the guard's copies and checks
Part = Literal[
    "data_wait",
    "transfer",
    "teacher",
    "forward",
    "backward",
    "communication",
    "optimizer",
    "metrics",
]
PARTS: tuple[Part, ...] = get_args(Part)
# The time of a batch outside of all parts.
REST = "rest"
# Work between batches, in seconds of the host. "coordination" is the exchange between ranks after
# each batch and the reading of the meters; on a GPU a part of it is a wait for kernels that are
# charged to their batch. "skipped" is the whole time of batches that were not completed.
Between = Literal["evaluation", "checkpoint", "tracking", "fidelity", "coordination", "skipped"]
BETWEEN: tuple[Between, ...] = get_args(Between)

# Batches are counted from 0 within an attempt; batch 0 warms up. Steps are counted over the run.
# Where the batch that is due is skipped, the next one that is completed takes its place.
MEMORY_EVERY = 200  # saved bytes and states: on batch 1, and every so many batches after it
OPERATIONS_EVERY = 1000  # operations: at step 2, and every so many steps after it
ACTIVITY_EVERY = 8  # spikes of each neuron: on one in so many evaluation samples, drawn by id
