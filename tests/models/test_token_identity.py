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
