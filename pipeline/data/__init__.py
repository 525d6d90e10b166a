"""Data sets and the loaders that read them. `ffcv` is imported here and nowhere else, and only when
a file is opened.
"""
