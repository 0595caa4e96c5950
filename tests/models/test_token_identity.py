"""Tokens are followed rightly or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewbit.models.token_identity import TokenIdentity

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
OTHER = torch.tensor([2, 0, 3, 1])


def tokens(function):
    """Token of each row of what `function` makes of rows 0, 1, 2, 3; None if that is not known."""
    identity, x = TokenIdentity(), X.clone()
    with identity:
        identity.begin(x)
        found = identity.of(function(x))
    return None if found is None else found.tolist()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x[OTHER], [2, 0, 3, 1]),
        (lambda x: x.view(2, 2, 6), [[0, 1], [2, 3]]),
        (lambda x: x.view(2, 2, 3, 2).transpose(1, 2).transpose(1, 2).reshape(4, 6), [0, 1, 2, 3]),
        (lambda x: x.view(4, 2, 3), [[0, 0], [1, 1], [2, 2], [3, 3]]),
        (lambda x: torch.cat([x[2:], torch.zeros(1, 6)]), [2, 3, -1]),
        (lambda x: nn.functional.silu(x.index_select(0, OTHER)) * 2 + 1, [2, 0, 3, 1]),
        (lambda x: nn.functional.linear(x[OTHER], torch.ones(3, 6)), [2, 0, 3, 1]),
        (lambda x: x[OTHER].add_(1), [2, 0, 3, 1]),
        (lambda x: x.repeat_interleave(2, 0)[:3], [0, 0, 1]),
        (lambda x: x.flip(0).chunk(2)[0], [3, 2]),
        (lambda x: x[:0] * 2, []),
        (lambda x: torch.add(x[OTHER], 1, out=None), [2, 0, 3, 1]),
    ],
)
def test_what_moves_rows_moves_their_tokens(function, expected):
    assert tokens(function) == expected


def _written_through_a_view(x):
    made = x.clone()
    made[:2].copy_(x[2:])
    return made


def _a_view_of_what_is_written(x):
    made = x.clone()
    view = made.view(4, 6)
    made.copy_(x.flip(0))
    return view


@pytest.mark.parametrize(
    "function",
    [
        _written_through_a_view,
        _a_view_of_what_is_written,
        lambda x: x.clone().data.copy_(x.flip(0)),
        lambda x: torch.index_select(x, 0, OTHER, out=x.clone()),
        lambda x: x.clone().index_copy_(0, OTHER, x),
        lambda x: x.cumsum(0),
        lambda x: torch.eye(4)[OTHER] @ x,
        lambda x: x + x[OTHER],
        lambda x: torch.add(x, other=x[OTHER]),
        lambda x: x.clone().add_(other=x[OTHER]),
        lambda x: torch.max(x, 0, keepdim=True, out=(x.new_empty(1, 6), torch.empty(1, 6, dtype=torch.int64)))[0],
        lambda x: x.clone().add_(x[OTHER]),
        lambda x: x.T.reshape(4, 6),
        lambda x: torch.where(torch.ones(4, 1, dtype=torch.bool), x, torch.zeros(4, 6)),
        lambda x: x.sort(0).values,
    ],
)
def test_what_mixes_rows_ends_it(function):
    assert tokens(function) is None


def test_numbers_hold_no_memory_of_what_they_are_moved_with():
    identity, x = TokenIdentity(), torch.randn(64, 512)
    with identity:
        identity.begin(x)
        moved = x[torch.arange(64).flip(0)]
        assert identity.of(moved).untyped_storage().nbytes() == 8 * 64


def test_what_is_of_no_token_takes_on_those_of_others():
    identity, x, positions = TokenIdentity(), X.clone().view(2, 2, 6), torch.randn(1, 2, 6)
    with identity:
        identity.begin(x, [positions])
        assert identity.of(positions).tolist() == [[-1, -1]]
        assert identity.of(x + positions.expand_as(x)).tolist() == [[0, 1], [2, 3]]
        assert identity.of(positions.expand_as(x) + x).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 3, 2, 5), [[[0, 0], [1, 1], [2, 2]], [[3, 3], [4, 4], [5, 5]]]),
        ((2, 2, 3, 5), [[[0, 1, 2], [3, 4, 5]]] * 2),
        ((6, 5), None),
    ],
)
def test_several_rows_of_one_token(shape, expected):
    identity, x = TokenIdentity(), torch.zeros(shape)
    identity.begin(x, layout=(2, 3))
    found = identity.of(x)
    assert (None if found is None else found.tolist()) == expected
