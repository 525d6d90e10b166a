"""The care that a run takes of files that may be damaged: how often it looks, and what it does without."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pipeline.data.base import Data, DataError

Verify = Literal["sampled", "full"]
ONE_IN: dict[Verify, int] = {"sampled": 256, "full": 1}
"""samples that are read for each one whose page is compared: a page of 8 MiB is much to read for one of 100 kB"""


@dataclass(frozen=True, kw_only=True)
class Care:
    """`one_in`: samples that are read for each one whose page is compared with its checksum; 0: no page is.
    `left_out`: samples of the training file, from one up to and without another, that are not trained on.
    """

    one_in: int = 0
    left_out: tuple[tuple[int, int], ...] = ()

    def ids_left_out(self) -> NDArray[np.int64]:
        return np.concatenate([np.arange(0), *(np.arange(first, end) for first, end in self.left_out)])


@runtime_checkable
class OnPages(Data, Protocol):
    """A data set in files with a checksum for each page."""

    def with_care(self, care: Care) -> Data:
        """The same sets, read so."""
        ...


def careful(data: Data, care: Care) -> Data:
    """The same sets, read with care where they lie in files.

    Raises: DataError for data that cannot do without the samples that are left out.
    """
    if isinstance(data, OnPages):
        return data.with_care(care)
    if care.left_out:
        raise DataError(f"data: needs files, such as those of Beton, to leave samples out; got {type(data).__name__}")
    return data
