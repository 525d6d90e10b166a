"""Names of the parts of a run's time, and the intervals of the costly measurements.

This module does not import torch, so that reports can import it quickly.
"""

from typing import Literal, get_args

# Parts of a batch:
#   data_wait      waiting for the loader
#   transfer       copying to the device, and mixing and encoding there
#   teacher        the teacher's predictions
#   forward        the rule's work before it yields a loss term
#   backward       differentiating the loss terms, and learning inside the rule
#   communication  all collectives, including the wait for the slowest rank
#   optimizer      updating the weights and the schedule
#   metrics        summing loss and correct predictions; the guard's copies and checks
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
# The time of a batch outside all parts.
REST = "rest"
# Work between batches, in seconds of the host. "coordination" is the exchange between ranks after
# each batch, and the reading of the meters. On a GPU it includes waits for kernels, whose time is
# charged to their batch as well. "skipped" is the time of uncompleted batches, except batch 0.
Section = Literal["evaluation", "checkpoint", "tracking", "fidelity", "coordination", "skipped"]
SECTIONS: tuple[Section, ...] = get_args(Section)

# Batches are counted from 0 within an attempt; batch 0 warms up. Steps are counted over the run.
# If a batch is not completed, the next batch is measured instead.
MEMORY_EVERY = 200  # saved bytes and states: batch 1, and every 200th batch after it
OPERATIONS_EVERY = 1000  # operations: step 2, and every 1000th step after it
ACTIVITY_EVERY = 8  # spikes of each neuron: one in 8 evaluation samples, drawn by id
