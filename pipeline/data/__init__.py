"""Data sets and the loaders that read them. FFCV is imported only below this package, and only
when a file is opened.
"""
