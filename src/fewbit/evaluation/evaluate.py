"""Evaluation block by block over all windows, so that a model larger than memory can be evaluated.

Perplexity as it is usually quoted: the whole text is tokenized once, cut into disjoint windows, each window is scored
by itself, and the mean is over all predicted tokens (window length − 1 per window).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fewbit import process
from fewbit.calibration.tokens import begin_with, beginning, checked_ids, read_texts, tokenize
from fewbit.errors import CalibrationError, CheckpointError, ConfigError
from fewbit.evaluation import metrics
from fewbit.evaluation.reference import Reference, last_hidden_states
from fewbit.evaluation.sources import open_any
from fewbit.models.blockwise import BlockwiseModel
from fewbit.pipeline.arguments import DEFAULT_ACTIVATION_MEMORY, choose_device, load_tokenizer, parse_size
from fewbit.pipeline.hidden_states import HiddenStates

LOGIT_ROWS = 128  # tokens whose logits are in memory at a time: with a vocabulary of 256k, 128 MB


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    perplexity: float
    windows: int
    sequence_length: int
    tokens: int
    """Predicted tokens."""
    reference_perplexity: float | None = None
    kl_mean: float | None = None
    """Mean KL(reference ‖ model) per token, in nats."""
    kl_p99: float | None = None
    """99th percentile of the KL per token."""
    top1_agreement: float | None = None
    """Share of tokens for which both models prefer the same next token."""

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@process.neutral()
def evaluate(
    model: str | Path | PreTrainedModel,
    text: str | Path | Tensor,
    *,
    sequence_length: int = 2048,
    max_windows: int | None = None,
    against: str | Path | PreTrainedModel | Reference | None = None,
    tokenizer: Any = None,
    device: str = "auto",
    activation_memory: str | int = DEFAULT_ACTIVATION_MEMORY,
) -> Evaluation:
    """Perplexity of a checkpoint, run, export or module on a text file, in windows of `sequence_length` tokens, or on
    token ids [windows, tokens].

    With `against`, also the distance to that model; a Reference computes its side once for several comparisons.
    Raises FewbitError for unusable input.
    """
    if sequence_length < 2:
        raise ConfigError(f"the sequence length must be at least 2, not {sequence_length}")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"the number of windows must be at least 1, not {max_windows}")
    blockwise = open_any(model)
    reference = against if isinstance(against, Reference | None) else Reference(against)
    if reference is not None and reference.model.vocabulary != blockwise.vocabulary:
        sizes = f"{blockwise.vocabulary} and {reference.model.vocabulary}"
        raise CheckpointError(
            f"the models have vocabularies of {sizes} tokens; only models with the same tokens can be compared"
        )
    if isinstance(text, Tensor):
        ids = checked_ids(text)[:max_windows]
        if ids.shape[1] < 2:
            raise CalibrationError("windows of one token have no next token to predict; give at least two")
    else:
        ids = _windows(text, tokenizer or load_tokenizer(blockwise.source.directory), sequence_length, max_windows)
    target = choose_device(device)
    budget = parse_size(activation_memory) // (1 if reference is None else 2)
    with tempfile.TemporaryDirectory(prefix="fewbit-") as scratch:
        hidden = last_hidden_states(blockwise, ids, target, budget, Path(scratch))
        if reference is None:
            return _score(blockwise, hidden, ids, target)
        expected = reference.last_hidden_states(ids, target, budget)
        return _compare(blockwise, hidden, reference.model, expected, ids, target)


def _windows(text: str | Path, tokenizer: Any, length: int, max_windows: int | None) -> Tensor:
    if tokenizer is None:
        raise CheckpointError("the model's directory has no tokenizer; give token ids instead of a text")
    texts, source = read_texts(text)
    tokens = tokenize(texts, tokenizer)
    first = beginning(tokenizer)
    length -= first.numel()
    count = tokens.numel() // length
    if count == 0 or max_windows == 0:
        raise CalibrationError(f"text {source} has {tokens.numel()} tokens, less than one window of {length}")
    count = min(count, max_windows or count)
    return begin_with(first, tokens[: count * length].view(count, length))


def _pieces(states: HiddenStates, ids: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """(window, its rows, hidden [1, rows, channels], next tokens [rows]) a few rows at a time, over all windows."""
    for index in range(len(states)):
        hidden = states.get(index)
        for start in range(0, ids.shape[1] - 1, LOGIT_ROWS):
            rows = slice(start, min(start + LOGIT_ROWS, ids.shape[1] - 1))
            yield index, rows, hidden[:, rows], ids[index, 1:][rows]


def _score(model: BlockwiseModel, states: HiddenStates, ids: Tensor, device: torch.device) -> Evaluation:
    losses = torch.empty(ids.shape[0], ids.shape[1] - 1)
    with model.head_loaded(device) as head:
        for window, rows, hidden, targets in _pieces(states, ids):
            losses[window, rows] = metrics.token_losses(head(hidden)[0], targets.to(device))
    return _evaluation(losses.flatten(), ids)


def _compare(
    model: BlockwiseModel,
    states: HiddenStates,
    reference: BlockwiseModel,
    reference_states: HiddenStates,
    ids: Tensor,
    device: torch.device,
) -> Evaluation:
    losses, reference_losses, divergence, agreement = torch.empty(4, ids.shape[0], ids.shape[1] - 1).unbind()
    with model.head_loaded(device) as head, reference.head_loaded(device) as reference_head:
        for window, rows, hidden, targets in _pieces(states, ids):
            logits, expected = head(hidden)[0], reference_head(reference_states.get(window)[:, rows])[0]
            losses[window, rows] = metrics.token_losses(logits, targets.to(device))
            reference_losses[window, rows] = metrics.token_losses(expected, targets.to(device))
            divergence[window, rows] = metrics.kl_divergence(expected, logits)
            agreement[window, rows] = metrics.same_top1(expected, logits).float()
    kl = divergence.flatten()
    return _evaluation(
        losses.flatten(),
        ids,
        reference_perplexity=_perplexity(reference_losses),
        kl_mean=kl.mean(dtype=torch.float64).item(),
        kl_p99=kl.quantile(0.99).item() if kl.numel() < 2**24 else kl.kthvalue(int(0.99 * kl.numel())).values.item(),
        top1_agreement=agreement.double().mean().item(),
    )


def _evaluation(losses: Tensor, ids: Tensor, **comparison: float) -> Evaluation:
    return Evaluation(
        perplexity=_perplexity(losses),
        windows=ids.shape[0],
        sequence_length=ids.shape[1],
        tokens=losses.numel(),
        **comparison,
    )


def _perplexity(losses: Tensor) -> float:
    return math.exp(losses.mean(dtype=torch.float64).item())
