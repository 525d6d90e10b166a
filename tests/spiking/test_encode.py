import pytest
import torch

from pipeline.spiking.encode import repeat


def test_repeat_is_a_view_of_one_frame():
    x_BCHW = torch.randn(2, 3, 4, 4)
    x_TBCHW = repeat(x_BCHW, 6)
    assert x_TBCHW.shape == (6, 2, 3, 4, 4)
    assert all(torch.equal(x_TBCHW[t], x_BCHW) for t in range(6))
    assert x_TBCHW.untyped_storage().data_ptr() == x_BCHW.untyped_storage().data_ptr()


def test_repeat_refuses_no_steps():
    with pytest.raises(ValueError, match="repeat: steps must be >= 1; got steps=0"):
        repeat(torch.zeros(1, 1, 1, 1), 0)
