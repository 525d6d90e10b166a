"""Network families, one file each; every file ends in plain builder functions.

A model maps `[T, B, ...]` to logits `[T, B, K]`.
"""
