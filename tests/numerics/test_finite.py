import pytest
import torch

from fewbit.numerics.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_none_is_seen(dtype, bad):
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(tensor)
    tensor[2, 1] = bad
    assert not is_finite(tensor)
