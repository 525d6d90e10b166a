"""Network families, one file each, and the parts and transforms that they share.

A family's file ends in builder functions. A model maps `[T, B, ...]` to logits `[T, B, K]`.
"""
