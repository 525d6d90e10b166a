import pytest
import torch

from pipeline.spiking.dropout import Dropout
from pipeline.spiking.state import fresh_state


def test_one_mask_for_each_batch_over_time_and_passes():
    torch.manual_seed(0)
    dropout, x_TB = Dropout(0.25), torch.ones(3, 50, 40)
    with fresh_state(dropout):
        first, again = dropout(x_TB), dropout(x_TB[:1])
    with fresh_state(dropout):
        other = dropout(x_TB)
    assert torch.equal(first[0], first[2]) and torch.equal(first[:1], again)
    assert not torch.equal(first, other)
    assert first.unique().tolist() == pytest.approx([0, 4 / 3])
    assert first.mean().item() == pytest.approx(1, abs=0.03)
    assert not torch.equal(first[:, 0], first[:, 1])  # each sample its own


@pytest.mark.parametrize("dropout", [Dropout(0.5).eval(), Dropout(0.0)])
def test_the_identity(dropout):
    x_TB = torch.ones(3, 4)
    assert dropout(x_TB) is x_TB


def test_needs_a_fresh_state_and_a_share():
    with pytest.raises(ValueError, match="Dropout: its membrane or trace exists only inside fresh_state"):
        Dropout(0.5)(torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match=r"Dropout: the share must be in 0\.\.1, 1 excluded; got share=1"):
        Dropout(1.0)
