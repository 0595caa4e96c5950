"""Records inputs and outputs of modules while the user runs their own generation or evaluation loop.

    with DataRecorder(model) as recorder:            # the first block's input and positions, and the token ids
        model.generate(**prompt)
        recorder.save_inputs("recordings")

Every call of a module is a step: a prefill and its decode steps are kept as a list. `recorded.py` reads the files.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fewbit.calibration.recorded import (
    ATTENTION_MASK,
    INPUT,
    INPUT_IDS,
    LINEAR_INPUT,
    OUTPUT,
    POSITION_EMBEDDINGS,
    POSITION_IDS,
    SUFFIXES,
    Step,
    device_of,
    write_recording,
)
from fewbit.errors import ArchitectureError, CalibrationError, ConfigError, nearest
from fewbit.models.forward_manager import first_tensor
from fewbit.models.nested import map_tensors, of_kind

Modules = str | nn.Module | Sequence[str | nn.Module] | None
"""A module, its name in the model, several of these, or None for the method's default."""
Find = Callable[[nn.Module, dict[str, Any]], Step | None]


class DataRecorder:
    """Copies the inputs and outputs of modules without changing them.

    One module is recorded under "model_input", "model_output" …; of a list of modules each under "model_input.NAME".

    Args:
        model: a model, whose first block is recorded by default, or the block, attention or linear to record.
        device: where recorded tensors are kept.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"a DataRecorder is made of a module, not of {type(model).__name__}; load it first")
        self.model = model
        self.device = device_of(device)
        self.recorded: dict[str, list[Step]] = {}
        """Steps by key, since the last `clear_inputs`."""
        self._hooks: dict[str, RemovableHandle] = {}
        self._names = {module: name for name, module in model.named_modules()}

    def register_input_hooks(self, modules: Modules = None) -> None:
        """Record the first input of modules (default: the first block; a block itself). Key: model_input."""
        for suffix, module in self._chosen(modules, 0):
            self._before(INPUT + suffix, module, _first_input)

    def register_pos_embed_hooks(self, modules: Modules = None) -> None:
        """Record the position embeddings and position ids that blocks are called with (default: the first block), or
        the output of a rotary embedding. Keys: model_pos_embed, model_position_ids."""
        for suffix, module in self._chosen(modules, 0):
            if "position_embeddings" in _parameters(module):
                self._before(POSITION_EMBEDDINGS + suffix, module, _argument("position_embeddings", _parts))
            elif _has_linears(module):
                raise ArchitectureError(f"{type(module).__name__} takes no position_embeddings to record")
            else:
                self._after(POSITION_EMBEDDINGS + suffix, module, _parts)
            self._before(POSITION_IDS + suffix, module, _argument("position_ids"))

    def register_linear_input_hooks(self, modules: Modules = None) -> None:
        """Record the input of every linear in modules (default: in the model). Keys: linear_input.NAME."""
        for _, module in self._chosen(modules):
            linears = [child for child in module.modules() if isinstance(child, nn.Linear)]
            if not linears:
                raise ArchitectureError(f"there is no linear in {type(module).__name__}, so no input can be recorded")
            for linear in linears:
                self._before(f"{LINEAR_INPUT}.{self._names[linear]}".rstrip("."), linear, _first_input)

    def register_input_ids_hooks(self, modules: Modules = None) -> None:
        """Record token ids, and the attention mask that tells padding (default: of the model's own call).
        Keys: model_input_ids, model_attention_mask (an empty tensor for a step without one)."""
        for suffix, module in self._chosen(modules):
            if not _may_take(module, "input_ids"):
                raise ArchitectureError(
                    f"{type(module).__name__} takes no input_ids, so none can be recorded; make a DataRecorder of "
                    "the model, and name the block in the other methods"
                )
            self._before(INPUT_IDS + suffix, module, _argument("input_ids"))
            self._before(ATTENTION_MASK + suffix, module, _argument("attention_mask", _mask))

    def register_output_hooks(self, modules: Modules = None) -> None:
        """Record the (first) output tensor of modules (default: the last block). Key: model_output."""
        for suffix, module in self._chosen(modules, -1):
            self._after(OUTPUT + suffix, module, first_tensor)

    def save_inputs(self, path: str | Path, *, allow_pickle: bool = False) -> Path:
        """Store what was recorded in a file, or in the next free sample-NUMBER.safetensors of a directory.

        Returns the file. Other suffixes than .safetensors are those of `fewbit.io.dump`; .pkl needs `allow_pickle`.
        CalibrationError if nothing was recorded.
        """
        # not every model hands its blocks position ids, and not every expert sees a token
        required = [key for key in self.recorded if not key.startswith((LINEAR_INPUT, POSITION_IDS))]
        missing = [key for key in required if not self.recorded[key]]
        if missing or not any(self.recorded.values()):
            what = f"for {missing[0]!r}" if missing else "(no hook is registered)" if not self.recorded else "at all"
            raise CalibrationError(f"nothing was recorded {what}; run the model between registering hooks and saving")
        path = Path(path)
        if path.suffix not in SUFFIXES:
            if path.is_file():
                raise ConfigError(f"{path} is a file; give a directory, or a file that ends in {', '.join(SUFFIXES)}")
            path = _next_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_recording({key: steps for key, steps in self.recorded.items() if steps}, path, allow_pickle=allow_pickle)
        return path

    def clear_inputs(self) -> None:
        """Forget what was recorded; hooks stay."""
        for steps in self.recorded.values():
            steps.clear()

    def remove_hooks(self, *kinds: str) -> None:
        """Stop recording everything, or some kinds ("model_input", …). What was recorded stays."""
        for key in [key for key in self._hooks if not kinds or key.partition(".")[0] in kinds]:
            self._hooks.pop(key).remove()

    remove_input_hooks = partialmethod(remove_hooks, INPUT)
    """Stop recording inputs."""
    remove_pos_embed_hooks = partialmethod(remove_hooks, POSITION_EMBEDDINGS, POSITION_IDS)
    """Stop recording position embeddings and position ids."""
    remove_linear_input_hooks = partialmethod(remove_hooks, LINEAR_INPUT)
    """Stop recording the inputs of linears."""
    remove_input_ids_hooks = partialmethod(remove_hooks, INPUT_IDS, ATTENTION_MASK)
    """Stop recording token ids."""
    remove_output_hooks = partialmethod(remove_hooks, OUTPUT)
    """Stop recording outputs."""

    def __enter__(self) -> DataRecorder:
        """Record; if nothing was registered, what a calibration set needs: input, positions, token ids."""
        if not self._hooks:
            block = self._default(0)
            self.register_input_hooks(block)
            if "position_embeddings" in _parameters(block):
                self.register_pos_embed_hooks(block)
            if "input_ids" in _parameters(self.model):
                self.register_input_ids_hooks()
        return self

    def __exit__(self, *error: object) -> None:
        self.remove_hooks()

    def _chosen(self, modules: Modules, block: int | None = None) -> Iterator[tuple[str, nn.Module]]:
        """Modules to record, each with what its keys end in."""
        if modules is None or isinstance(modules, str | nn.Module):
            yield "", self._default(block) if modules is None else self._module(modules)
        else:
            for module in map(self._module, modules):
                yield f".{self._names[module]}", module

    def _default(self, block: int | None) -> nn.Module:
        """A model's block, or the given module itself."""
        blocks = _blocks(self.model) if block is not None else None
        return self.model if blocks is None or block is None else blocks[block]

    def _module(self, module: str | nn.Module) -> nn.Module:
        if isinstance(module, nn.Module):
            if module not in self._names:
                raise ArchitectureError(f"this {type(module).__name__} is no part of the {type(self.model).__name__}")
            return module
        try:
            return self.model.get_submodule(module)
        except AttributeError:
            names = [name for name in self._names.values() if name]
            close = nearest(module, names) if len(names) < 1000 else ""
            raise ArchitectureError(f"{type(self.model).__name__} has no module {module!r}{close}") from None

    def _before(self, key: str, module: nn.Module, find: Find) -> None:
        """Record what `find` takes from the arguments of a call."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(key, find(module, _arguments(module, args, kwargs)))

        self._add(key, partial(module.register_forward_pre_hook, hook, with_kwargs=True))

    def _after(self, key: str, module: nn.Module, find: Callable[[Any], Step | None]) -> None:
        """Record what `find` takes from the output of a call."""
        hook = partial(module.register_forward_hook, lambda module, args, output: self._keep(key, find(output)))
        self._add(key, hook)

    def _add(self, key: str, register: Callable[[], RemovableHandle]) -> None:
        if key in self._hooks:
            raise ConfigError(f"{key!r} is recorded already; give several modules as one list, or remove its hooks")
        self.recorded.setdefault(key, [])
        self._hooks[key] = register()

    def _keep(self, key: str, step: Step | None) -> None:
        if step is not None:
            copied = map_tensors(step, lambda x: x.detach().to(self.device, copy=True).contiguous())
            self.recorded[key].append(copied)


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, in order."""
    try:
        named = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # the forward was replaced by something that does not say what it takes
        named = {f"argument {number}": value for number, value in enumerate(args)}
    return {**named, **kwargs}


def _first_input(module: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    found: Tensor | None = next(of_kind(arguments, Tensor), None)
    if found is None:
        raise CalibrationError(f"{type(module).__name__} was called without a tensor, so there is no input to record")
    return found


def _tensor(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _parts(value: Any) -> Step | None:
    if isinstance(value, list | tuple):
        return tuple(part for part in value if isinstance(part, Tensor))
    return _tensor(value)


def _mask(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) and value.ndim == 2 else torch.empty(0, dtype=torch.bool)


def _argument(name: str, find: Callable[[Any], Step | None] = _tensor) -> Find:
    return lambda module, arguments: find(arguments.get(name))


def _blocks(model: nn.Module) -> nn.ModuleList | None:
    """The list of like layers with the most parameters; None for a module that is a block, or part of one, itself."""
    if next(iter(_parameters(model)), None) == "hidden_states":  # it may hold a list of experts
        return None
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(set(map(type, m))) == 1]
    return max(filter(_has_linears, lists), key=lambda m: sum(p.numel() for p in m.parameters()), default=None)


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


def _may_take(module: nn.Module, name: str) -> bool:
    """Whether a module's forward can be called with an argument of that name; a block's **kwargs hold other things."""
    parameters = _parameters(module)
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return name in parameters or (anything and next(iter(parameters)) != "hidden_states")


def _has_linears(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def _next_file(directory: Path) -> Path:
    """sample-00000.safetensors, or the number after the last one there is."""
    numbers = [int(number) for path in directory.glob("sample-*") if (number := path.stem.partition("-")[2]).isdigit()]
    return directory / f"sample-{max(numbers, default=-1) + 1:05d}.safetensors"
