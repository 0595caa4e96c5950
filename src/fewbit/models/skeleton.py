"""transformers' own modules of a configuration: parameters on the meta device, buffers computed for real.

A configuration is somebody else's data, so it is first built on the meta device, where nothing costs memory: sizes of
parameters can then be compared with what is stored, and those of buffers looked at, before anything is made.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from fewbit import process
from fewbit.errors import ArchitectureError, CheckpointError, first_line

_thread = threading.local()
MOST_BUFFERS = 2**31  # bytes of what is computed instead of stored (rotary frequencies, masks)


def build(config: PretrainedConfig, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """The model of `config`, by default a causal language model. ArchitectureError if there is none."""
    kind = model_class or class_of(config)
    with _building(kind), empty_parameters():
        return _make(kind, config)


def outline(config: PretrainedConfig, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """The same on the meta device altogether. ArchitectureError for a configuration that transformers cannot build."""
    kind = model_class or class_of(config)
    with _building(kind), torch.device("meta"):
        made = _make(kind, config)
    if (size := sum(buffer.nbytes for buffer in made.buffers())) > MOST_BUFFERS:
        raise CheckpointError(
            f"config.json describes a {kind.__name__} whose buffers alone take {size / 1e9:.0f} GB; mend it"
        )
    return made


def class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of a configuration's model: the one that config.json names, or transformers' causal language model.

    ArchitectureError, which says what to do, if neither is there.
    """
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    found = [kind for mapping in mappings for kind in _classes(mapping, config)]
    named = [kind for kind in found if kind.__name__ in (config.architectures or ())]
    if named or found:
        return (named or found)[0]
    kind = repr(config.model_type)
    why = f"transformers has no causal language model for {kind}; ModelQuantizer rounds the weights of any network"
    if _classes(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, config):
        why = f"{kind} is an encoder-decoder, and fewbit walks decoders; ModelQuantizer rounds its weights"
    raise ArchitectureError(f"{why}, run_gptq_for_sequential_layers quantizes any stack of layers in memory")


def is_composite(config: PretrainedConfig) -> bool:
    """Whether a configuration has one for text and others (images, sound) in it."""
    return config.get_text_config() is not config


def _classes(mapping: Any, config: PretrainedConfig) -> list[type[PreTrainedModel]]:
    found = mapping.get(type(config), ())
    return list(found) if isinstance(found, list | tuple) else [found]


def _make(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    config = copy.deepcopy(config)  # building the modules writes dtype and attention into it
    if getattr(config, "quantization_config", None) is not None:
        config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    if is_composite(config) and kind.config_class is type(config.get_text_config()):
        config = config.get_text_config()  # as AutoModelForCausalLM has it
    make: Callable[..., Any] = kind._from_config
    # sdpa has no soft cap on logits and silently leaves it out
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    try:
        return make(config, dtype=torch.float32, attn_implementation="eager" if capped else "sdpa")
    except ValueError:  # some families have no such attention (or none at all)
        return make(config, dtype=torch.float32, attn_implementation="eager")


@contextmanager
def _building(kind: type[PreTrainedModel]) -> Iterator[None]:
    """transformers is silent, and its errors are sentences; one thread at a time, because verbosity and default dtype
    are the whole process's."""
    with process.lock:
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        try:
            yield
        except Exception as error:  # sizes that do not fit each other make modules raise anything
            raise ArchitectureError(
                f"config.json describes no model that {kind.__name__} can be built as: {first_line(error)}"
            ) from None
        finally:
            transformers_logging.set_verbosity(verbosity)


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Parameters of modules that this thread makes inside are on the meta device, while buffers are computed.

    accelerate's init_empty_weights replaces a method of nn.Module for that, and so takes the weights of modules that
    other threads make meanwhile. Here torch's own hook is told which thread wants it.
    """
    before = getattr(_thread, "wanted", False)
    _thread.wanted = True
    try:
        yield
    finally:
        _thread.wanted = before


def _without_memory(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or parameter.is_meta or not getattr(_thread, "wanted", False):
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


# Never removed: removing a hook while another thread iterates over the hooks would raise there.
register_module_parameter_registration_hook(_without_memory)  # type: ignore[arg-type]
