"""A causal language model of which only one block has weights at a time.

The modules are transformers' own, built without weights; a block's parameters are filled from a TensorSource, used
and released. Nothing is traced and no forward is rewritten: what the model hands its blocks (masks, rotary
embeddings, …) is recorded while its own Python runs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbit.checkpoint.configuration import load_config, quantization_of
from fewbit.checkpoint.names import weight_of
from fewbit.checkpoint.source import ModuleSource, SafetensorsSource, TensorSource
from fewbit.errors import ArchitectureError, CheckpointError, FewbitError, first_line
from fewbit.models import detect, stored
from fewbit.models.architecture import Architecture, Groups, listed
from fewbit.models.block_stack import BlockCall
from fewbit.models.memory import trim_grown_heap, trim_heap
from fewbit.models.nested import to_device
from fewbit.models.probe import kind_of, linears_in, probe_tokens
from fewbit.models.skeleton import build, outline
from fewbit.nn import in_memory, linear


@dataclass
class BlockInputs:
    """What the blocks are called with for one batch of token ids."""

    hidden: Tensor
    """[batch, tokens, channels], the input of the first block, float32 on the CPU."""
    calls: list[BlockCall]
    """One per block."""


class BlockwiseModel:
    """A model whose blocks are loaded one at a time. Weights and computation are float32."""

    def __init__(
        self, skeleton: PreTrainedModel, source: TensorSource, architecture: Architecture | None = None
    ) -> None:
        self.skeleton = skeleton
        self.source = source
        self.config = skeleton.config
        skeleton.eval().requires_grad_(False)
        model_type = str(self.config.model_type)
        self.architecture = architecture or listed(model_type) or detect.architecture(skeleton, model_type)
        self.blocks: nn.ModuleList = detect.get_module_list(skeleton, self.architecture.blocks)
        linear.adopt(skeleton)
        self._groups: dict[Hashable, Groups] = {}
        self.module: PreTrainedModel | None = None
        """The model in memory whose weights these are, if it is one."""
        self._returns_tuple = False  # what the model expects of its blocks: known once one was called
        stored.check(skeleton, source.info(), self.architecture.name)
        self._aliases = stored.aliases(skeleton, source.info())

    @classmethod
    def from_directory(cls, directory: str | Path, source: TensorSource | None = None) -> BlockwiseModel:
        """A checkpoint directory with config.json; `source` gives the weights if they are no plain safetensors."""
        directory = Path(directory)
        plain = source is None
        if source is None:
            source = SafetensorsSource(directory)  # first: its errors are about what the user gave
        config = load_config(directory, len(source.info()))
        if plain and (quantization := quantization_of(config.to_dict(), directory)) is not None:
            raise CheckpointError(
                f"{directory} is already quantized ({quantization.get('quant_method')}), which fewbit cannot undo; "
                "give the original checkpoint"
            )
        outlined = outline(config)
        if plain:
            stored.refuse_codes(outlined, source.info())
        stored.check(outlined, source.info(), config.model_type)
        return cls(build(config), source)

    @classmethod
    def from_module(cls, model: PreTrainedModel) -> BlockwiseModel:
        """A transformers model in memory. It is only read: blocks work on copies."""
        if isinstance(model, nn.Module):
            model = in_memory.unwrapped(model)
        if not isinstance(model, PreTrainedModel):
            raise ArchitectureError(
                f"{type(model).__name__} is no transformers model; give a PreTrainedModel or a checkpoint's directory"
            )
        built = build(model.config, type(model))
        in_memory.check_as_built(model, built)
        whole = ModuleSource(model)
        own = stored.untied(built, whole)
        made = cls(built, ModuleSource(model, without=stored.tied_pairs(built).keys() - own))
        made.module = model
        made.config = copy.deepcopy(model.config)  # what is saved beside the weights says what the user's model said
        for part in (made.config, made.config.get_text_config()):
            if own and getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False
        return made

    @cached_property
    def config_changes(self) -> dict[str, Any]:
        """Fields of config.json that must be other ones beside these weights."""
        return {"tie_word_embeddings": False} if stored.untied(self.skeleton, self.source) else {}

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(self.skeleton.get_input_embeddings().num_embeddings)

    def __len__(self) -> int:
        return len(self.blocks)

    def groups(self, index: int, passing: Sequence[Callable[[], object]] = ()) -> Groups:
        """Linears of a block that share an input, in execution order: what the architecture says of its kind, or found
        by a probe of the first block of the kind."""
        block = self.blocks[index]
        kind = kind_of(block)
        if kind not in self._groups:
            listed = self.architecture.groups(linears_in(block))
            self._groups[kind] = listed or self._probed(index, passing)
        return self._groups[kind]

    def _probed(self, index: int, passing: Sequence[Callable[[], object]]) -> Groups:
        """Groups of a block that no row describes; many tokens pass where few do not reach all experts."""
        if passing:  # it is loaded
            return detect.groups(self.blocks[index], self.architecture.name, passing)
        batches = [{"input_ids": tokens.unsqueeze(0)} for tokens in probe_tokens(self.vocabulary)]
        inputs = list(self.enter(batches))
        with self.loaded(index) as block, torch.no_grad():
            forwards = [partial(self.call_block, block, one.hidden, one.calls[index]) for one in inputs]
            return detect.groups(block, self.architecture.name, forwards)

    def block_name(self, index: int) -> str:
        return f"{self.architecture.blocks}.{index}"

    def prefix(self, index: int) -> str:
        """What the full names of a block's modules begin with."""
        return f"{self.block_name(index)}."

    def full_groups(self) -> list[tuple[str, ...]]:
        """Linears that share an input, by their full names, of all blocks."""
        return [
            tuple(self.prefix(index) + name for name in group.members)
            for index in range(len(self))
            for group in self.groups(index)
        ]

    def stored_dtype(self, name: str) -> torch.dtype:
        """Dtype of a linear's weight in the checkpoint."""
        return self.source.info()[weight_of(name)].dtype

    def linears(self) -> dict[str, linear.Linear]:
        """Every linear of the model, inside and outside of the blocks, by its full name."""
        return {name: module for name, module in self.skeleton.named_modules() if isinstance(module, linear.Linear)}

    def block_tensors(self, index: int) -> list[str]:
        """Names of one block's tensors in the checkpoint."""
        prefix, there = self.prefix(index), self.source.info()
        return [prefix + name for name in self.blocks[index].state_dict() if prefix + name in there]

    def outside_tensors(self) -> list[str]:
        """Names of the stored tensors that belong to no block."""
        inside = {name for index in range(len(self)) for name in self.block_tensors(index)}
        return [name for name in self.skeleton.state_dict() if name not in inside and name in self.source.info()]

    @contextmanager
    def loaded(
        self, index: int, device: torch.device | str = "cpu", read: Callable[[], dict[str, Tensor]] | None = None
    ) -> Iterator[nn.Module]:
        """Block `index` with its float32 weights on `device`, released afterwards.

        `read` gives other weights ({full name: float32 tensor}) than the source's.
        """
        prefix = self.prefix(index)
        tensors = read() if read is not None else self.source.read(self.block_tensors(index), torch.float32)
        block = self.blocks[index]
        _fill(block, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, device)
        del tensors
        try:
            yield block
        finally:
            _release(block)
            trim_grown_heap()

    def enter(
        self, batches: Iterable[Mapping[str, Tensor]], device: torch.device | str = "cpu"
    ) -> Iterator[BlockInputs]:
        """What the blocks are called with for each batch ({"input_ids": [batch, tokens], maybe "attention_mask"}).

        Batches of the same shape in which every token counts share masks and rotary embeddings.
        """
        parent = self.skeleton.get_submodule(self.architecture.blocks.rpartition(".")[0])
        shared: dict[tuple[int, ...], list[BlockCall]] = {}
        with self._outside_loaded(device, skip_head=True):
            for batch in batches:
                inputs = self._record(parent, {name: tensor.to(device) for name, tensor in batch.items()})
                mask = batch.get("attention_mask")
                if mask is None or bool(mask.all()):
                    key = (*batch["input_ids"].shape, mask is None)
                    inputs.calls = shared.setdefault(key, inputs.calls)
                yield inputs

    @contextmanager
    def head_loaded(self, device: torch.device | str = "cpu") -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from the last block's output [batch, tokens, channels] to float32 logits [batch, tokens, vocab].

        The model's own code runs with blocks that answer with the given tensor: norm, head and soft caps are its own.
        """

        def head(hidden: Tensor) -> Tensor:
            given = hidden.to(device)
            width = self.skeleton.get_input_embeddings().embedding_dim  # another than the blocks' in some families
            embedded = given if width == given.shape[-1] else given.new_zeros(*given.shape[:-1], width)
            with self._blocks_replaced(lambda _index, _hidden, _call: self._answer(given)):
                out = self.skeleton(inputs_embeds=embedded, use_cache=False).logits
            return out.float()  # type: ignore[no-any-return]

        with self._outside_loaded(device, skip_head=False):
            yield head

    def call_block(self, block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
        """One block's output hidden states [batch, tokens, channels]."""
        output: Tensor | tuple[Tensor, ...] = block(hidden, **to_device(call, hidden.device))
        self._returns_tuple = isinstance(output, tuple)
        return output[0] if isinstance(output, tuple) else output

    def _answer(self, hidden: Tensor) -> Tensor | tuple[Tensor]:
        """Hidden states as the model takes them from a block."""
        return (hidden,) if self._returns_tuple else hidden

    def _record(self, parent: nn.Module, batch: Mapping[str, Tensor]) -> BlockInputs:
        first: list[Tensor] = []
        calls: list[BlockCall] = []

        def record(index: int, hidden: Tensor, call: BlockCall) -> Tensor | tuple[Tensor]:
            if index == 0:
                first.append(hidden.detach().float().cpu())
            elif hidden.shape != first[0].shape:  # the model has taken the first of a tuple that was none
                self._returns_tuple = True
            calls.append(call)
            if index == len(self) - 1:
                raise _LastBlockReachedError
            return self._answer(first[0].to(hidden.device))

        with self._blocks_replaced(record):
            try:
                parent(**batch, use_cache=False)
            except _LastBlockReachedError:
                return BlockInputs(first[0], calls)
            except FewbitError:
                raise
            except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
                raise ArchitectureError(
                    f"{type(parent).__name__} of transformers fails with this configuration: {first_line(error)}"
                ) from error
        raise ArchitectureError(f"{type(parent).__name__} did not call all blocks of {self.architecture.blocks}")

    @contextmanager
    def _blocks_replaced(self, stand_in: Callable[[int, Tensor, BlockCall], Any]) -> Iterator[None]:
        """Every block's forward becomes stand_in(index, hidden states, keyword arguments)."""

        def forward_of(index: int) -> Callable[..., Any]:
            names = _positional(self.blocks[index])

            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                if len(args) > len(names):
                    raise ArchitectureError(
                        f"blocks of {self.architecture.name} get positional arguments, which have no name to record"
                    )
                return stand_in(index, hidden_states, dict(zip(names, args, strict=False)) | kwargs)

            return forward

        for index, block in enumerate(self.blocks):
            block.__dict__["forward"] = forward_of(index)
        try:
            with torch.no_grad():
                yield
        finally:
            for block in self.blocks:
                del block.forward  # the class's own forward is visible again

    @contextmanager
    def _outside_loaded(self, device: torch.device | str, skip_head: bool) -> Iterator[None]:
        """Embeddings, norms and (unless skipped) the head have weights inside this context."""
        head, embeddings = weight_of(self.architecture.head), weight_of(self.architecture.embeddings)
        names = {*self.outside_tensors(), *self._aliases} - {head if skip_head else embeddings}
        own = {name: self._aliases.get(name, name) for name in names}  # logits need no embeddings: none is looked up
        read = self.source.read(set(own.values()), torch.float32)
        tensors = {name: read[other] for name, other in own.items()}
        del read
        _fill(self.skeleton, tensors, device)
        try:
            yield
        finally:
            for name in tensors:
                _set(self.skeleton, name, torch.empty_like(tensors[name], device="meta"))
            tensors.clear()
            trim_heap()


def _positional(block: nn.Module) -> list[str]:
    """Names of what a block's forward can be given by position, behind the hidden states."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(type(block).forward).parameters.values()
    return [parameter.name for parameter in found if parameter.kind in kinds][2:]  # self, hidden states


class _LastBlockReachedError(Exception):
    """Ends the recording: norm and head are not needed."""


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], device: torch.device | str) -> None:
    for name, tensor in tensors.items():
        _set(module, name, tensor.to(device))
    for child in module.modules():  # buffers that are computed, not stored
        for name, buffer in child._buffers.items():
            if buffer is not None and not buffer.is_meta:
                child._buffers[name] = buffer.to(device)


def _release(module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        _set(module, name, torch.empty_like(tensor, device="meta"))


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
