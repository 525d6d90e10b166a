"""Neurons, synapses, norms and their state, on time-first tensors `[T, B, ...]`.

Without a rule, a model trains by plain BPTT. Rules change this by setting seams.
"""
