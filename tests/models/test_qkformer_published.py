from pathlib import Path

import pytest
import torch

from pipeline.models.attention import OverSamples, SelfAttention
from pipeline.models.qkformer import QKFormer, qkformer_10
from pipeline.models.qkformer_published import IGNORED, from_published, published_name, to_published
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import fresh_state

GOLDEN = Path(__file__).parents[1] / "golden" / "qkformer_10_384.txt"


def published() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published module."""
    lines = [line.split() for line in GOLDEN.read_text().splitlines()]
    return {name: tuple(map(int, shape)) for name, *shape in lines}


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        ours = {
            name: tuple(tensor.shape) for name, tensor in to_published(qkformer_10(384)).items()
        }
    theirs = {
        name: shape for name, shape in published().items() if name.rsplit(".", 1)[-1] not in IGNORED
    }
    assert len(theirs) == len(ours) == 367
    assert ours == theirs


def small() -> QKFormer:
    return QKFormer(channels=64, depth=5, heads=1, classes=7, in_channels=2)


def test_there_and_back():
    model = small().eval()
    weights = to_published(model) | {"patch_embed1.proj_bn.num_batches_tracked": torch.tensor(3)}
    again = from_published(weights).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    x_TBCHW = repeat(torch.randn(2, 2, 32, 32), 2)
    with torch.no_grad(), fresh_state(model), fresh_state(again):
        assert torch.equal(model(x_TBCHW), again(x_TBCHW))


def test_published_weights_keep_statistics_over_time_unless_those_of_each_step_are_set():
    weights = to_published(small())
    assert {norm.over for norm in norms(from_published(weights))} == {"time"}
    assert {norm.over for norm in norms(from_published(weights, over="step"))} == {"step"}


def norms(network: QKFormer) -> list[BatchNorm]:
    found = [module for module in network.modules() if isinstance(module, BatchNorm)]
    assert len(found) > 20
    return found


def test_published_weights_answer_as_the_published_code_where_that_is_chosen():
    """In a batch, the published function is another one; the weights and their names are the
    same.
    """
    weights = to_published(small())
    networks = [
        from_published(weights, projection_neuron=each).eval()
        for each in ("over_time", "over_samples")
    ]
    assert all(to_published(each).keys() == weights.keys() for each in networks)
    for network, expected in zip(networks, (LIF, OverSamples), strict=True):
        assert [
            type(each.last) for each in network.modules() if isinstance(each, SelfAttention)
        ] == [expected] * 2


def test_refuses_what_does_not_fit():
    weights = to_published(small())
    for said, refused in (
        (
            r"must be those of a published QKFormer; got none named 'head.weight'",
            lambda: from_published(
                {name: tensor for name, tensor in weights.items() if name != "head.weight"}
            ),
        ),
        (
            r"got 1 missing: stages\.1\.2\.ffn\.branch\.2\.norm\.bias",
            lambda: from_published(
                {
                    name: tensor
                    for name, tensor in weights.items()
                    if name != "stage2.1.mlp.fc2_bn.bias"
                }
            ),
        ),
        (
            r"got 1 unknown: pos_embed",
            lambda: from_published(weights | {"pos_embed": torch.zeros(1)}),
        ),
        (
            r"got 1 of another shape: classifier.bias \(\[8\] instead of \[7\]\)",
            lambda: from_published(weights | {"head.bias": torch.zeros(8)}),
        ),
        (
            r"head.weight must have 2 dimensions; got the shape \(7,\)",
            lambda: from_published(weights | {"head.weight": torch.zeros(7)}),
        ),
        (
            "heads must be given for fewer than 64 channels; got 36 channels",
            lambda: from_published(weights | {"head.weight": torch.zeros(7, 36)}),
        ),
        (
            r"only tensors of a QKFormer with shortcut='sew' were published; got .*ffn\.0\.branch",
            lambda: published_name("stages.0.1.ffn.0.branch.0.synapse.weight"),
        ),
    ):
        with pytest.raises(ValueError, match=said):
            refused()
