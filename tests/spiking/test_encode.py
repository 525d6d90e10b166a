import torch

from pipeline.spiking.encode import is_static, repeat, to_time_first
from tests.helpers.rule_networks import refusals


def test_repeat_is_a_view_of_one_frame():
    x_BCHW = torch.randn(2, 3, 4, 4)
    x_TBCHW = repeat(x_BCHW, 6)
    assert x_TBCHW.shape == (6, 2, 3, 4, 4)
    assert all(torch.equal(x_TBCHW[t], x_BCHW) for t in range(6))
    assert x_TBCHW.untyped_storage().data_ptr() == x_BCHW.untyped_storage().data_ptr()


def test_still_is_what_repeat_made():
    x_TBCHW = repeat(torch.randn(2, 3, 4, 4), 6)
    assert is_static(x_TBCHW) and all(
        is_static(x_cBCHW) for x_cBCHW in (x_TBCHW[:1], x_TBCHW[2:5], x_TBCHW[:, :1])
    )
    assert (
        not is_static(x_TBCHW.contiguous())
        and not is_static(x_TBCHW.contiguous()[:1])
        and not is_static(x_TBCHW * 1)
    )


def test_recordings_come_time_first_and_as_long_as_asked():
    x_BTCHW = torch.randn(2, 3, 2, 4, 4)
    assert torch.equal(to_time_first(x_BTCHW, 3), x_BTCHW.transpose(0, 1))
    assert torch.equal(to_time_first(x_BTCHW[:, 0], 5), repeat(x_BTCHW[:, 0], 5))


test_refuses = refusals(
    [
        (
            lambda: to_time_first(torch.randn(2, 3, 2, 4, 4), 4),
            r"an image \[C, H, W\] or 4 frames \[T, C, H, W\]; got \(3, 2, 4, 4\)",
        ),
        (
            lambda: repeat(torch.zeros(1, 1, 1, 1), 0),
            "repeat: steps must be a whole number >= 1; got steps=0",
        ),
    ]
)
