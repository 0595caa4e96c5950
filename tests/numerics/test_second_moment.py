import pytest
import torch

from fewbit.numerics.second_moment import NARROWEST as TILE
from fewbit.numerics.second_moment import accumulate, quadratic_form, symmetrize

SIZES = [1, 5, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 17]


def small_integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float32 integers so small that every sum of products here is exact, so that results can be compared exactly."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("channels", SIZES)
class TestAccumulate:
    def test_tiles_make_the_whole_product(self, channels):
        x = small_integers(20, channels)
        moment = torch.zeros(channels, channels)
        accumulate(moment, x)
        assert torch.equal(symmetrize(moment), x.T @ x)

    def test_batches_add_up_to_the_product_of_all_tokens(self, channels):
        batches = [small_integers(tokens, channels, seed=tokens) for tokens in (1, 7, 12)]
        moment = torch.zeros(channels, channels)
        for batch in batches:
            accumulate(moment, batch)
        x = torch.cat(batches)
        assert torch.equal(symmetrize(moment), x.T @ x)

    def test_no_token_changes_nothing(self, channels):
        moment = small_integers(channels, channels)
        before = moment.clone()
        accumulate(moment, torch.empty(0, channels))
        assert torch.equal(moment, before)

    def test_symmetrize_works_in_place_and_keeps_the_upper_triangle(self, channels):
        moment = small_integers(channels, channels)
        upper = torch.triu(moment)
        result = symmetrize(moment)
        assert result is moment
        assert torch.equal(moment, upper + torch.triu(upper, 1).T)


@pytest.mark.parametrize("rows", [1, 6])
def test_quadratic_form_is_the_squared_output_error_of_each_row(rows):
    x, delta = small_integers(20, 48), small_integers(rows, 48, seed=1)
    loss = quadratic_form(delta, x.T @ x)
    assert loss.dtype == torch.float64
    assert torch.equal(loss, (x.double() @ delta.double().T).square().sum(0))


def test_quadratic_form_agrees_with_float64_on_real_numbers():
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(200, 64, generator=generator), torch.randn(9, 64, generator=generator)
    moment = x.T @ x
    exact = torch.einsum("rc,cd,rd->r", delta.double(), moment.double(), delta.double())
    torch.testing.assert_close(quadratic_form(delta, moment), exact, rtol=1e-5, atol=0)
