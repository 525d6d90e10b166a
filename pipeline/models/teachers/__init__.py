"""Frozen networks whose answers an objective distils: how they are had, how they look at a picture,
what they remember.
"""
