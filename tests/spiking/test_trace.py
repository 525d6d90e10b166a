import pytest
import torch

from pipeline.spiking.trace import Trace
from tests.helpers.rule_networks import batch
from tests.helpers.traces import traces_of


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_trace_identity(chunk):
    trace, x_TBC = Trace(0.7), batch(8)[0]
    trace.state.is_open = True
    got = torch.cat([trace(x) for x in x_TBC.split(chunk)])
    assert (got - traces_of(x_TBC, 0.7)).abs().max() < 1e-14
    kept = trace.state.read("a")
    assert (
        kept is not None
        and torch.equal(kept, got[-1])
        and kept.untyped_storage().nbytes() == kept.numel() * 8
    )


def test_a_trace_is_a_tensor_of_its_own_and_never_below_fp32():
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        trace, x_TBC = Trace(0.5), torch.ones(1, 2, 3, dtype=dtype, requires_grad=True)
        trace.state.is_open = True
        first, second = trace(x_TBC), trace(x_TBC)
        assert first.dtype == second.dtype == expected and not second.requires_grad
        assert first.data_ptr() != x_TBC.data_ptr()
        assert torch.equal(second, 1.5 * torch.ones_like(second))
