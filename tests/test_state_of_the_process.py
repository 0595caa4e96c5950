"""Same input, same result, whatever the process has set, at every entry point; the process is as it was afterwards."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import fewbit
from fewbit import Config, ModelQuantizer
from fewbit.nn.fake_quant import W4A8FakeLinear
from fewbit.nn.quant_linear import QuantLinear

IDS = torch.randint(1, 300, (4, 16), generator=torch.Generator().manual_seed(3))
X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(4))


def _digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes() if tensor.numel() else b"")
    return found.hexdigest()


def _state(model: nn.Module) -> str:
    return _digest(*(tensor.reshape(-1) for tensor in model.state_dict().values()))


def _files(directory: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(directory.rglob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


def quantizing(model: nn.Module, scratch: Path) -> str:
    recipe = {"scheme": "W4A8KVFP8", "group_size": 32, "algorithm": "smoothquant+gptq"}
    run = fewbit.quantize(
        model, config=recipe, calibration=[{"input_ids": IDS}], output=scratch / "run", progress=False, device="cpu"
    )
    run.export("compressed-tensors")
    run.verify()
    return _files(scratch)


def evaluating(model: nn.Module, scratch: Path) -> str:
    reference = fewbit.Reference(model)
    found = fewbit.evaluate(model, IDS, against=reference, device="cpu")
    return repr(found)


def in_memory(model: nn.Module, scratch: Path) -> str:
    config = Config.from_dict({"scheme": "W8A8_STATIC", "algorithm": "gptq"})
    return _state(ModelQuantizer(config).quantize_model(model, [IDS]))


def by_steps(model: nn.Module, scratch: Path) -> str:
    net = model.model.layers[0].mlp
    fewbit.quantize_(net, "int4", "int8")
    with fewbit.calibrate(net), torch.autocast("cpu", enabled=False):  # the model is called by its user
        net(X)
    fewbit.freeze(net)
    return _state(net)


def one_module(model: nn.Module, scratch: Path) -> str:
    linear = model.model.layers[0].mlp.up_proj
    fake, packed = W4A8FakeLinear.from_module(linear, group_size=32), QuantLinear.from_module(linear, group_size=32)
    return _digest(fake.fake_weight(), packed.codes, packed.scale, fewbit.Quantizer(4, "per-token")(X))


def recorded(model: nn.Module) -> object:
    """The model is called by its user."""
    with torch.autocast("cpu", enabled=False), torch.device("cpu"), fewbit.DataRecorder(model) as recorder:
        model(IDS, use_cache=False)
    return fewbit.build_calib_dataset_inputs([recorder.recorded])


def gptq_of_layers(model: nn.Module, scratch: Path) -> str:
    config = fewbit.SequentialGPTQConfig(bits=4, group_size=32)
    fewbit.run_gptq_for_sequential_layers(model.model.layers, recorded(model), config)
    return _state(model)


def smoothing_of_layers(model: nn.Module, scratch: Path) -> str:
    fewbit.run_smooth_quant_for_sequential_layers(model.model.layers, recorded(model), "W8A8")
    return _state(model)


ENTRIES = [quantizing, evaluating, in_memory, by_steps, one_module, gptq_of_layers, smoothing_of_layers]


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def low_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


STATES = [default_dtype, default_device, low_precision, deterministic, autocast, torch.inference_mode, torch.no_grad]


@pytest.fixture(scope="module")
def expected(random_model, tmp_path_factory) -> dict[Callable[..., str], str]:
    found = {}
    for entry in ENTRIES:
        found[entry] = entry(random_model("llama"), tmp_path_factory.mktemp("plain"))
    return found


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_results_do_not_depend_on_the_state_of_the_process(random_model, tmp_path, expected, entry, state):
    model = random_model("llama")
    with state():
        before = _process()
        found = entry(model, tmp_path)
        assert _process() == before
    assert found == expected[entry]


def _process() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device().type,
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        _digest(torch.get_rng_state()),
    )


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_training_mode_and_gradients_of_a_model_do_not_matter_and_stay(random_model, tmp_path, expected, entry):
    model = random_model("llama", attention_dropout=0.5).train()
    model.config.attention_dropout = 0.5
    entry(model, tmp_path)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.model.norm.parameters())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_models_made_for_inference_are_taken(tmp_path, random_model, expected, entry):
    with torch.inference_mode():
        model = random_model("llama")
    assert model.lm_head.weight.is_inference()
    with torch.inference_mode():  # their forward works nowhere else with gradients
        assert entry(model, tmp_path) == expected[entry]


def test_two_threads_at_once_and_a_third_that_makes_modules(random_model, tmp_path, expected):
    done, errors = threading.Event(), []
    found: dict[int, str] = {}

    def work(number: int) -> None:
        try:
            for turn in range(2):
                scratch = tmp_path / f"{number}-{turn}"
                scratch.mkdir()
                found[number * 10 + turn] = quantizing(models[number], scratch)
        except BaseException as error:
            errors.append(error)

    def unrelated() -> None:
        while not done.is_set():
            linear = nn.Linear(4, 4)
            if linear.weight.is_meta or linear.weight.dtype != torch.float32:
                errors.append(AssertionError(linear.weight))
            time.sleep(1e-4)  # else it takes from the others most of the time that they share

    models = [random_model("llama"), random_model("llama")]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    other = threading.Thread(target=unrelated)
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    other.join()
    assert errors == []
    assert set(found.values()) == {expected[quantizing]}
    assert len(found) == 4
