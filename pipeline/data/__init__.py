"""Data sets and their loaders.

FFCV is imported only inside this package, and only when a file is opened.
"""
