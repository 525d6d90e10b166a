"""Frozen teacher networks. A student distils their predictions."""
