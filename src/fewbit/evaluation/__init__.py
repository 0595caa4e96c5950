"""What quantization cost: perplexity, and the distance to a reference model."""

from fewbit.evaluation.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
