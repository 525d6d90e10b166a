"""Launchers: start the workers of a run and follow it to its end."""
