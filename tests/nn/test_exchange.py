"""A model in memory is changed as a whole or not at all; what a user put on a module goes along or is refused."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from fewbit.errors import ConfigError
from fewbit.nn.exchange import Exchange, carry_over
from fewbit.nn.in_memory import check_plain


def _shared() -> nn.Sequential:
    linear = nn.Linear(4, 4)
    return nn.Sequential(linear, nn.Sequential(nn.ReLU(), linear), nn.Linear(4, 2))


def test_nothing_happens_before_commit_and_undo_takes_everything_back() -> None:
    model = _shared()
    old, new = model[0], nn.Linear(4, 4)
    values = model[2].weight.detach().clone()
    changes = Exchange()
    changes.replace(model, {old: new})
    changes.data(model[2].weight, torch.zeros(2, 4))
    changes.item(vars(model), "tag", 1)
    assert model[0] is old
    changes.commit()
    assert model[0] is new
    assert model[1][1] is new  # wherever it is used
    assert not model[2].weight.any()
    assert model.tag == 1
    changes.undo()
    assert model[0] is old
    assert model[1][1] is old
    assert torch.equal(model[2].weight, values)
    assert not hasattr(model, "tag")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_fails_afterwards_undoes_the_exchange(error: type[BaseException]) -> None:
    model = _shared()
    changes = Exchange()
    changes.replace(model, {model[2]: nn.Identity()})

    def fails() -> None:
        with changes.undone_on_error():
            assert isinstance(model[2], nn.Identity)
            raise error

    with pytest.raises(error):
        fails()
    assert isinstance(model[2], nn.Linear)


def _own_forward(linear: nn.Linear) -> None:
    linear.forward = lambda x: x


def _buffer(linear: nn.Linear) -> None:
    linear.register_buffer("gain", torch.ones(4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_own_forward, "forward of its own"),
        (_buffer, "'gain'"),
        (nn.utils.weight_norm, "computed anew"),
        (nn.utils.spectral_norm, "computed anew"),
        (parametrizations.orthogonal, "parametrized"),
        (lambda linear: prune.l1_unstructured(linear, "weight", 0.5), "computed anew"),
        (lambda linear: linear.add_module("adapter", nn.Linear(4, 4)), "'adapter'"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_a_counterpart_would_drop_is_refused_by_name(change, words: str) -> None:
    linear = nn.Linear(4, 4)
    change(linear)
    with pytest.raises(ConfigError, match=r"the\.one") as refusal:
        check_plain(linear, "the.one")
    assert words in str(refusal.value)


def test_hooks_and_their_handles_go_along() -> None:
    old, new = nn.Linear(4, 4), nn.Linear(4, 4).eval()
    handles = [
        old.register_forward_hook(lambda _m, _x, y: y + 1),
        old.register_forward_pre_hook(lambda _m, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True),
    ]
    x = torch.randn(3, 4)
    plain = new(2 * x) + 1
    carry_over(old, new)
    assert torch.equal(new(x), plain)
    assert new.training
    for handle in handles:
        handle.remove()
    assert torch.equal(new(x), nn.functional.linear(x, new.weight, new.bias))
