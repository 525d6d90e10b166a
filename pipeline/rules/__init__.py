"""Training rules, one file each. A rule replaces `loss.backward()`. `base.py` has the interface."""
