"""What fewbit computes does not depend on the state of the process, and leaves it as it was."""

import threading

import pytest
import torch

from fewbit import process


@pytest.fixture(autouse=True)
def _restored():
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)
    torch.set_float32_matmul_precision(precision)


def _state() -> dict[str, object]:
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device().type,
        "autocast": torch.is_autocast_enabled("cpu"),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "precision": torch.backends.mkldnn.matmul.fp32_precision,
    }


def _unusual() -> None:
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    torch.set_float32_matmul_precision("medium")


def test_state_is_neutral_inside_and_as_it_was_afterwards() -> None:
    _unusual()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        before = _state()
        with process.neutral():
            inside = _state()
            made = torch.ones(2)
        assert _state() == before
    assert inside == {
        "dtype": torch.float32,
        "device": "cpu",
        "autocast": False,
        "grad": False,
        "inference": False,
        "precision": "ieee",
    }
    assert made.dtype == torch.float32
    assert not made.is_inference()


def test_state_is_restored_when_something_is_raised() -> None:
    _unusual()
    before = _state()

    @process.neutral()
    def fails() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert _state() == before


def test_default_device_can_stay() -> None:
    torch.set_default_device("meta")
    with process.neutral(default_device=False):
        assert torch.ones(1).is_meta


def test_shared_state_is_restored_by_the_last_thread_that_leaves() -> None:
    torch.set_default_dtype(torch.float64)
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with process.neutral():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with process.neutral():
        thread.start()
        assert entered.wait(10)
    assert torch.get_default_dtype() == torch.float32  # the other one still works
    leave.set()
    thread.join()
    assert torch.get_default_dtype() == torch.float64
