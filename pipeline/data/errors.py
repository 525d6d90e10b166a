"""How data fails. Apart from base.py, so that writing processes need not import torch."""


class DataError(ValueError):
    """Data, or a size asked of it, that cannot be used: who, the rule, what was got, what is
    accepted. A retry does not help.
    """


class LoaderError(RuntimeError):
    """A loader or writer that failed or went silent for a reason of the machine's, not of the
    data's. A retry may help.
    """
