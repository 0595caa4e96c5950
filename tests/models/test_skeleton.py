"""Modules without memory are made for one thread alone."""

import threading

import torch
from torch import nn

from fewbit.models.skeleton import empty_parameters


class _WithBuffer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("frequencies", torch.arange(4.0))


def test_parameters_are_empty_and_buffers_are_not() -> None:
    with empty_parameters():
        made = nn.Sequential(_WithBuffer(), nn.LayerNorm(4))
    assert all(parameter.is_meta for parameter in made.parameters())
    assert torch.equal(made[0].frequencies, torch.arange(4.0))
    assert not nn.Linear(2, 2).weight.is_meta


def test_modules_of_other_threads_are_left_alone() -> None:
    made: list[nn.Linear] = []
    with empty_parameters():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
    assert not made[0].weight.is_meta
