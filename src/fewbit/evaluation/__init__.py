"""What quantization cost: perplexity, and the distance to a reference model."""

from fewbit.evaluation.evaluate import Evaluation, evaluate
from fewbit.evaluation.reference import Reference

__all__ = ["Evaluation", "Reference", "evaluate"]
