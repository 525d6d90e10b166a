import pytest
import torch

from pipeline.models.residual import Residual
from pipeline.spiking.dropout import Dropout, DropPath
from pipeline.spiking.state import fresh_state
from tests.helpers.rule_networks import outputs, refusals


def three_passes(layer: torch.nn.Module, x_TB: torch.Tensor) -> list[torch.Tensor]:
    """Two of one batch, the second of its first step alone, and one of another batch."""
    with fresh_state(layer):
        first, again = layer(x_TB), layer(x_TB[:1])
    return [first, again, outputs(layer, x_TB)]


@pytest.mark.parametrize(
    ("layer", "shape", "about"),
    [(Dropout(0.25), (3, 50, 40), 0.03), (DropPath(0.25), (3, 400, 2, 4, 4), 0.1)],
)
def test_one_mask_for_each_batch_over_time_and_passes(layer, shape, about):
    first, again, other = three_passes(layer, torch.ones(shape))
    assert torch.equal(first, first[:1].expand_as(first)) and torch.equal(first[:1], again)
    assert not torch.equal(first, other)
    assert len({tuple(sample.flatten().tolist()) for sample in first[0]}) > 1
    assert first.unique().tolist() == pytest.approx([0, 4 / 3])
    assert first.mean().item() == pytest.approx(1, abs=about)


def test_a_path_is_dropped_for_whole_samples():
    first, *_ = three_passes(DropPath(0.25), torch.ones(3, 400, 2, 4, 4))
    assert torch.equal(first, first[:, :, :1, :1, :1].expand_as(first))


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


test_refuses = refusals(
    [
        (
            lambda: Dropout(0.5)(torch.ones(1, 2, 3)),
            "Dropout: the state exists only inside fresh_state",
        ),
        (
            lambda: Dropout(1.0),
            r"Dropout: share must be in 0\.\.1, 1 excluded; got share=1",
        ),
    ]
)
