"""Frozen teacher networks, whose predictions a student distils."""
