"""Evaluation block by block over all windows, for models larger than memory.

Perplexity as usually quoted: the whole text is tokenized once and cut into disjoint windows, each scored on its own;
the mean is over all predicted tokens (window length − 1 per window).
"""

import logging
import math
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fewbit import process
from fewbit.calibration import tokens
from fewbit.calibration.hidden_states import HiddenStates, check_finite
from fewbit.checkpoint.tokenizer import load_tokenizer
from fewbit.config.run_options import EvaluationOptions, choose_device, parse_size
from fewbit.errors import CalibrationError, CheckpointError
from fewbit.evaluation import metrics
from fewbit.evaluation.reference import Reference, last_hidden_states
from fewbit.formats.table import open_any
from fewbit.models.blockwise import BlockwiseModel
from fewbit.models.limits import check_length, check_tokens
from fewbit.scratch import temporary_directory

logger = logging.getLogger("fewbit")

LARGEST_LOSS = 700.0  # a guess among all tokens of a vocabulary costs 12; e^710 is no number
LOGIT_ROWS = 128  # tokens whose logits are in memory at a time: with a vocabulary of 256k, 128 MB


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation."""

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
    warnings: tuple[str, ...] = ()
    """Why the numbers may be misleading; also logged before the work."""

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None and value != ()}


@process.neutral()
def evaluate(
    model: str | os.PathLike[str] | PreTrainedModel,
    text: tokens.CalibrationData,
    *,
    sequence_length: int = EvaluationOptions.sequence_length,
    max_windows: int | None = EvaluationOptions.max_windows,
    against: str | os.PathLike[str] | PreTrainedModel | Reference | None = None,
    tokenizer: Any = None,
    device: str = EvaluationOptions.device,
    activation_memory: str | int = EvaluationOptions.activation_memory,
) -> Evaluation:
    """Perplexity of a checkpoint, run, export or module, and its distance to a reference model.

    Args:
        text: a text file, texts or rows (as `calibration` of `fewbit.quantize`), cut into windows of `sequence_length`
            tokens; or token ids [windows, tokens].
        against: the reference model; a Reference computes its side once for several comparisons.
        sequence_length, max_windows, device, activation_memory: see `fewbit.config.run_options.EvaluationOptions`.
        tokenizer: of a model in memory; directories bring their own.

    Raises FewbitError for unusable input.
    """
    options = EvaluationOptions(device, activation_memory, sequence_length, max_windows)
    blockwise = open_any(model)
    reference = against if isinstance(against, Reference | None) else Reference(against)
    models = [blockwise] if reference is None else [blockwise, reference.model]
    sizes = [found.vocabulary for found in models]
    if len(set(sizes)) > 1:
        raise CheckpointError(
            f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens; only models with the same tokens can "
            "be compared"
        )
    ids = _windows(text, tokenizer, blockwise, options)
    for found in models:
        check_tokens(found, [{"input_ids": ids}])
    warnings = tuple(dict.fromkeys(said for found in models for said in check_length(found, ids.shape[1])))
    for warning in warnings:
        logger.warning(warning)
    target = choose_device(options.device)
    budget = parse_size(options.activation_memory) // len(models)
    with temporary_directory("evaluate") as scratch:
        states = [last_hidden_states(blockwise, ids, target, budget, scratch / "states")]
        if reference is not None:
            states.append(reference.last_hidden_states(ids, target, budget))
        return replace(_score(models, states, ids, target), warnings=warnings)


def _windows(text: Any, tokenizer: Any, model: BlockwiseModel, options: EvaluationOptions) -> Tensor:
    """Token ids [windows, tokens]: as given, or of the text cut into windows; at most `max_windows`."""
    most = options.max_windows
    found, source = tokens.rows_of(text)
    if not isinstance(found, Tensor) and tokens.all_ids(found, source):
        found = _stacked(found)
    if isinstance(found, Tensor):
        ids = tokens.checked_ids(found)[:most]
        if ids.shape[1] < 2:
            raise CalibrationError("windows of one token have no next token to predict; give at least two")
        return ids
    stream, first = tokens.stream_of(found, source, tokenizer, partial(load_tokenizer, model.source.directory))
    length = max(1, options.sequence_length - first.numel())
    count = stream.numel() // length
    if count == 0:
        raise CalibrationError(f"text {source} has {stream.numel()} tokens, less than one window of {length}")
    count = min(count, most or count)
    return tokens.begin_with(first, stream[: count * length].view(count, length))


def _stacked(rows: list[Any]) -> Tensor:
    """Token ids of rows as windows [windows, tokens]."""
    batches = [tokens.token_batch(row) for row in rows]
    if any("attention_mask" in batch and not batch["attention_mask"].all() for batch in batches):
        raise CalibrationError("windows of token ids cannot hold padding in an evaluation; cut them to one length")
    if len({batch["input_ids"].shape[1:] for batch in batches}) > 1:
        raise CalibrationError("windows of token ids must have one length in an evaluation; cut or pack them")
    return torch.cat([batch["input_ids"] for batch in batches])


def _score(models: list[BlockwiseModel], states: list[HiddenStates], ids: Tensor, device: torch.device) -> Evaluation:
    """From the last hidden states of a model and, if there is one, of the reference, a few logits at a time."""
    windows, length = ids.shape
    losses = torch.empty(len(models), windows, length - 1)
    divergence, agreement = torch.empty(2, windows, length - 1)
    with ExitStack() as stack:
        heads = [stack.enter_context(model.head_loaded(device)) for model in models]
        for window in range(windows):
            hidden = [of_one.get(window) for of_one in states]
            for start in range(0, length - 1, LOGIT_ROWS):
                rows = slice(start, min(start + LOGIT_ROWS, length - 1))
                targets, logits = ids[window, 1:][rows].to(device), list[Tensor]()
                for head, one, whose in zip(heads, hidden, ("the model", "the reference"), strict=False):
                    found = head(one[:, rows])  # [1, rows, vocabulary]
                    check_finite(found, f"the head of {whose}", window, first_token=start)
                    losses[len(logits), window, rows] = metrics.token_losses(found[0], targets)
                    logits.append(found[0])
                if len(logits) > 1:
                    divergence[window, rows] = metrics.kl_divergence(logits[1], logits[0])
                    agreement[window, rows] = metrics.same_top1(logits[1], logits[0]).float()
    result = Evaluation(_perplexity(losses[0]), windows=windows, sequence_length=length, tokens=losses[0].numel())
    if len(models) == 1:
        return result
    kl = divergence.flatten()
    return replace(
        result,
        reference_perplexity=_perplexity(losses[1]),
        kl_mean=kl.mean(dtype=torch.float64).item(),
        kl_p99=kl.quantile(0.99).item() if kl.numel() < 2**24 else kl.kthvalue(int(0.99 * kl.numel())).values.item(),
        top1_agreement=agreement.double().mean().item(),
    )


def _perplexity(losses: Tensor) -> float:
    loss = losses.mean(dtype=torch.float64).item()
    if loss > LARGEST_LOSS:
        raise CalibrationError(
            f"the loss is {loss:.3g} nats per token, beyond any perplexity in float64; is the model damaged?"
        )
    return math.exp(loss)
