"""On which batches of an attempt, or samples of an evaluation, that is measured which would cost
too much on all; without torch, so that reports can read it.

Batches are counted from the attempt's first, 0, which warms up, and steps from the run's. In the
place of one that is skipped stands the next that is not.
"""

from __future__ import annotations

MEMORY_EVERY = 200
"""bytes that backward keeps alive, and states: on batch 1, and every so many from there"""
OPERATIONS_EVERY = 1000
"""operations: at step 2, and every so many from there"""
ACTIVITY_EVERY = 8
"""spikes, neuron by neuron: on one in so many samples of an evaluation, drawn by their ids"""
