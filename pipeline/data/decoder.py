"""FFCV's slot for a compiled loop of ours: from sample ids to float32 [B, ...]."""

from typing import Any

import numpy as np

from pipeline.data.ffcv_api import AllocationQuery, Operation, State


class Decoder(Operation):
    """Base of the loops; a subclass gives its code in `generate_code`.

    Its memory holds, for each batch in flight, the output, (seed, epoch) - which numba would freeze in a closure - and one status
    a sample: 0, or not, where `what` of it could not be read.
    `name`: the field of the file that is decoded. `shape`: of one sample of the output.
    """

    KEYS, STATUS = 1, 2  # places in the memory

    def __init__(self, *, name: str, what: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.name, self.what, self.shape = name, what, shape

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        state = State(jit_mode=True, device=previous_state.device, shape=self.shape, dtype=np.dtype(np.float32))
        memory = (
            AllocationQuery(self.shape, np.dtype(np.float32)),
            AllocationQuery((2,), np.dtype(np.uint64)),
            AllocationQuery((1,), np.dtype(np.int32)),
        )
        return state, memory
