"""On which batches of an attempt, or samples of an evaluation, that is measured which would cost too much on all; without torch,
so that reports can read it.

Batches are counted from the attempt's first, 0, which warms up. In the place of one that is skipped stands the next that is not.
"""

from __future__ import annotations

MEMORY_EVERY = 200
"""bytes that backward keeps alive, and states: on batch 1, and every so many from there"""
OPERATIONS_EVERY = 1000
"""operations: on batch 2, and every so many from there"""
ACTIVITY_EVERY = 7
"""spikes, neuron by neuron: of one in so many samples, those whose id it divides, so of the same whatever the number of workers.
A prime, so that of a file in which 10, 100 or 1000 classes take turns none is left out."""
