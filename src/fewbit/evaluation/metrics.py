"""Pure functions on logits. All in float32, natural logarithms."""

import torch
from torch import Tensor


def token_losses(logits: Tensor, next_tokens: Tensor) -> Tensor:
    """−log p of each next token: logits [tokens, vocabulary], next_tokens [tokens] → [tokens]."""
    return torch.nn.functional.cross_entropy(logits.float(), next_tokens, reduction="none")


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference ‖ model) of each token's distribution: two [tokens, vocabulary] → [tokens]."""
    log_p = reference.float().log_softmax(-1)
    log_q = logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def same_top1(reference: Tensor, logits: Tensor) -> Tensor:
    """Whether both models prefer the same token: bool [tokens]."""
    return reference.argmax(-1) == logits.argmax(-1)
