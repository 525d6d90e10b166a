"""Networks, one family a file; each file ends in plain builder functions. A model maps `[T, B,
...]` to logits `[T, B, K]`.
"""
