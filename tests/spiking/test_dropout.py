import pytest
import torch

from pipeline.models.residual import Residual
from pipeline.spiking.dropout import Dropout, DropPath
from pipeline.spiking.state import fresh_state
from tests.helpers.rule_networks import outputs


def test_one_mask_for_each_batch_over_time_and_passes():
    dropout, x_TB = Dropout(0.25), torch.ones(3, 50, 40)
    with fresh_state(dropout):
        first, again = dropout(x_TB), dropout(x_TB[:1])
    other = outputs(dropout, x_TB, grad=True)
    assert torch.equal(first[0], first[2]) and torch.equal(first[:1], again)
    assert not torch.equal(first, other)
    assert first.unique().tolist() == pytest.approx([0, 4 / 3])
    assert first.mean().item() == pytest.approx(1, abs=0.03)
    assert not torch.equal(first[:, 0], first[:, 1])  # each sample its own


def test_a_path_is_dropped_for_whole_samples_at_all_times_and_in_every_pass():
    drop, x_TBCHW = DropPath(0.25), torch.ones(3, 400, 2, 4, 4)
    with fresh_state(drop):
        first, again = drop(x_TBCHW), drop(x_TBCHW[1:2])
    other = outputs(drop, x_TBCHW, grad=True)
    of_samples_B = first[0, :, 0, 0, 0]
    assert torch.equal(
        first, of_samples_B[:, None, None, None].expand_as(first)
    )  # one number for all of a sample, over T too
    assert torch.equal(again[0], first[0])
    assert of_samples_B.unique().tolist() == pytest.approx([0, 4 / 3])
    assert of_samples_B.mean().item() == pytest.approx(1, abs=0.1)  # 3.5 standard errors
    assert not torch.equal(first, other)


def test_a_sample_whose_branch_is_dropped_is_its_shortcut():
    block, x_TBC = Residual(torch.nn.Linear(3, 3), drop_path=0.5), torch.randn(2, 40, 3)
    y_TBC = outputs(block, x_TBC, grad=True)
    dropped_B = (y_TBC == x_TBC).all(-1).all(0)
    assert 5 < dropped_B.sum() < 35
    kept = (x_TBC + 2 * block.branch(x_TBC))[:, ~dropped_B]
    assert torch.allclose(y_TBC[:, ~dropped_B], kept, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dropout", [Dropout(0.5).eval(), Dropout(0.0)])
def test_the_identity(dropout):
    x_TB = torch.ones(3, 4)
    assert dropout(x_TB) is x_TB


def test_needs_a_fresh_state_and_a_share():
    with pytest.raises(
        ValueError, match="Dropout: its membrane or trace exists only inside fresh_state"
    ):
        Dropout(0.5)(torch.ones(1, 2, 3))
    with pytest.raises(
        ValueError, match=r"Dropout: the share must be in 0\.\.1, 1 excluded; got share=1"
    ):
        Dropout(1.0)
