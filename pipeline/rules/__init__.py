"""Training rules, one file each. A rule replaces `loss.backward()`; `base.py` defines the
interface.
"""
