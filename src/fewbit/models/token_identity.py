"""Which token each row of a tensor belongs to, followed through a block that chooses or reorders tokens.

A tensor [..., channels] has a token for every place of its leading dimensions. Operations that move rows (indexing,
views, gathering) are done to the tokens' numbers as well; those that work on each row by itself pass them on. Behind
any other operation the tokens are not known, which is never the same as wrong.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fewbit.models.hooks import removed_at_the_end

# fmt: off
_MOVING = {
    "__getitem__", "index_select", "gather", "take_along_dim", "masked_select", "select", "narrow", "view", "reshape",
    "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "swapaxes", "permute",
    "movedim", "expand", "expand_as", "repeat", "repeat_interleave", "flip", "roll", "cat", "concat", "stack", "split",
    "chunk", "unbind", "tile",
}
"""Functions and methods whose result holds the elements of what they are given, elsewhere."""
_OF_THE_FIRST = {"linear", "matmul", "bmm", "scaled_dot_product_attention"}
"""Functions whose result has at every place to do with the first operand's row there."""
_ROWWISE = _OF_THE_FIRST | {
    "abs", "add", "addcmul", "bfloat16", "celu", "clamp", "clip", "clone", "contiguous", "detach", "div", "double",
    "dropout", "elu", "exp", "float", "gelu", "glu", "half", "hardswish", "hardtanh", "layer_norm", "leaky_relu",
    "lerp", "log", "logsigmoid", "masked_fill", "maximum", "minimum", "mish", "mul", "nan_to_num", "neg", "pow",
    "relu", "relu6", "rms_norm", "rsqrt", "selu", "sigmoid", "silu", "softplus", "sqrt", "square", "sub", "tanh", "to",
    "true_divide", "type", "type_as",
}
"""Functions that work on each row by itself."""
_OPERATORS = {
    "radd": "add", "iadd": "add", "rmul": "mul", "imul": "mul", "rsub": "sub", "isub": "sub",
    "truediv": "div", "rtruediv": "div", "itruediv": "div",
}
_WRITING = {"setitem", "iadd", "imul", "isub", "itruediv"}
# fmt: on


class TokenIdentity(TorchFunctionMode):
    """While entered, follows the tokens of tensors that were marked."""

    def __init__(self) -> None:
        super().__init__()
        self._tokens = WeakTensorKeyDictionary()
        self._total = 0

    @contextmanager
    def following(self, *blocks: nn.Module) -> Iterator[None]:
        """Entered, with the first tensor of floats marked that a block is called with."""

        def mark(_block: nn.Module, args: Any, kwargs: Any) -> None:
            if given := [x for x in _tensors([*args, *kwargs.values()]) if x.is_floating_point()]:
                self.begin(given[0], given[1:])

        with self, removed_at_the_end() as hooks:
            for block in blocks:
                hooks.append(block.register_forward_pre_hook(mark, with_kwargs=True))
            yield

    def mark(self, x: Tensor, tokens: Tensor | None = None) -> None:
        """`tokens` [...], int64, are those of `x` [..., channels]: by default 0, 1, 2 … in the order of its rows."""
        if tokens is None:
            tokens = torch.arange(x.shape[:-1].numel()).view(x.shape[:-1])
        self._tokens[x] = tokens.to(x.device)

    def begin(self, x: Tensor, others: Iterable[Tensor] = (), layout: Sequence[int] | None = None) -> None:
        """`x` [..., channels] goes into a block: its rows are the tokens. With a `layout` (the mask's shape) that
        makes up the first or the last of its leading dimensions, several rows are of one token; with another one
        nobody knows. Rows of `others` that are laid out otherwise (what cross-attention reads) are of none."""
        rows = x.shape[:-1]
        self._total = rows.numel()
        if layout is None or tuple(layout) == rows:
            self.mark(x)
        elif rows[: len(layout)] == tuple(layout):
            tokens = torch.arange(torch.Size(layout).numel()).view(*layout, *[1] * (len(rows) - len(layout)))
            self.mark(x, tokens.expand(rows))
        elif rows[len(rows) - len(layout) :] == tuple(layout):
            self.mark(x, torch.arange(torch.Size(layout).numel()).view(*layout).expand(rows))
        for other in others:
            if other.is_floating_point() and other.ndim == x.ndim and other.shape[:-1] != x.shape[:-1]:
                self.mark(other, torch.full(other.shape[:-1], -1))

    def of(self, x: Tensor) -> Tensor | None:
        """The token [...] of each row of `x` [..., channels], −1 for rows of none; None where they are not known."""
        known: Tensor | None = self._tokens.get(x)
        return None if known is None or known.shape != x.shape[:-1] else known

    def is_routed(self, x: Tensor) -> bool:
        """Whether the rows of `x` [..., channels] are not the tokens that the block was given, one by one in order."""
        tokens = self.of(x)
        if tokens is None:
            return self._total not in (0, x.shape[:-1].numel())  # 0: the block was not called as such
        return not torch.equal(tokens.flatten(), torch.arange(self._total, device=tokens.device))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name.startswith("__get__") or name in ("size", "dim", "numel"):
            return result
        name, writes = _plain(name)
        operands, out = list(_tensors([*args, *kwargs.values()])), kwargs.get("out")
        if writes or out is not None:
            if name not in _ROWWISE or out is not None or not self._agree(operands):
                for written in _tensors([args[:1] if out is None else out]):
                    self._forget(written)
            return result
        given = [x for x in operands if self.of(x) is not None]
        if name in _OF_THE_FIRST:
            given = given[:1] if given and given[0] is args[0] else []
        if given:
            if name in _MOVING:
                self._move(func, args, kwargs, result)
            elif name in _ROWWISE:
                self._pass_on(given, result)
        return result

    def _agree(self, given: Sequence[Tensor]) -> bool:
        """Whether the rows of all tensors that are laid out like the first, if known, are of the same tokens."""
        known = [tokens for x in given if (tokens := self.of(x)) is not None and x.shape[:-1] == given[0].shape[:-1]]
        known = [tokens for tokens in known if bool((tokens >= 0).any())]
        return all(torch.equal(known[0], tokens) for tokens in known[1:])

    def _forget(self, written: Tensor) -> None:
        """Of whatever shares memory with a tensor that was written, the tokens are not known any more."""
        memory = written.untyped_storage().data_ptr()
        for x in [x for x in self._tokens if x.untyped_storage().data_ptr() == memory]:
            del self._tokens[x]

    def _move(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Move the tokens' numbers as the elements were moved."""
        try:
            moved = func(*_replaced(args, self._numbers), **kwargs)
        except (RuntimeError, TypeError, IndexError):
            return
        for x, numbers in zip(_tensors([result]), _tensors([moved]), strict=False):
            if x.ndim and x.shape == numbers.shape and numbers.dtype == torch.int64:
                tokens = numbers[..., 0].clone() if x.shape[-1] else numbers.new_zeros(x.shape[:-1])
                if bool((numbers == tokens.unsqueeze(-1)).all()):
                    self.mark(x, tokens)

    def _numbers(self, x: Tensor) -> Tensor:
        """The token's number in every element; −1 where there is none. Indices stay what they are."""
        tokens = self.of(x)
        if tokens is None:
            return x if not x.is_floating_point() else torch.full_like(x, -1, dtype=torch.int64)
        return tokens.unsqueeze(-1).expand(x.shape)

    def _pass_on(self, given: Sequence[Tensor], result: Any) -> None:
        for x in _tensors([result]):
            fitting = [one for one in given if one.shape[:-1] == x.shape[:-1]]
            if fitting and self._agree(fitting):  # rows of no token (positions, say) take on those of others
                self._tokens[x] = max(
                    (self._tokens[one] for one in fitting), key=lambda tokens: bool((tokens >= 0).any())
                )


def _plain(name: str) -> tuple[str, bool]:
    """A function's name without the marks of operators, and whether it writes into its first operand."""
    if name.startswith("__") and name.endswith("__"):
        plain = name.strip("_")
        return ("__getitem__" if plain == "getitem" else _OPERATORS.get(plain, plain)), plain in _WRITING
    return name.removesuffix("_"), name.endswith("_")


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Tensors among arguments or results, those in lists and tuples, too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _replaced(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, list | tuple):
        made = [_replaced(value, change) for value in values]
        return made if isinstance(values, list) else tuple(made)
    return values
