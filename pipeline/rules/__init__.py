"""Training rules: what replaces `loss.backward()`. One file each; `base.py` has the contract."""
