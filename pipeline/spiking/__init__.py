"""Neurons, synapses, norms and their state, on time-first tensors `[T, B, ...]`.

Without a rule, a model trains by plain BPTT. A rule changes this by setting seams: attributes of
neurons, synapses and other modules that replace a part of their forward or backward
(`state.SEAMS`).
"""
