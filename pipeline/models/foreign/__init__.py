"""Networks with neurons of SpikingJelly, snnTorch or norse, for the rules (`wrap.py`).

None of these packages is imported. A module of theirs is recognised by its class.
"""
