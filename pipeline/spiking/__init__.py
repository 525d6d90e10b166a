"""Neurons, synapses and what they remember: time first, `[T, B, ...]`, and plain BPTT until a rule
sets a seam.
"""
