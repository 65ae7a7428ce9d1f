"""Owners of memory and the message when it runs out. CPU; seconds.

    python -m pytest tests/unit/test_memory.py
"""

import pytest
import torch
import torch.nn as nn

from nanosync import errors
from nanosync.memory import memory_owners, watch_memory

CPU = torch.device("cpu")
GIB = 2**30
SETTINGS = ("batch_size", "block_size", "activation_checkpointing", "use_fsdp", "use_zero1")
OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})


@pytest.fixture(autouse=True)
def forget():
    yield
    errors.memory_owners.clear()


def message(owners, settings=SETTINGS):
    errors.memory_owners[:] = [owners]
    error = OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    return errors._message_for_user(OutOfMemoryError, error, settings)


def trained():
    model = nn.Linear(1000, 100, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(2, 1000)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_owners_are_what_this_process_holds_on_the_device():
    model, optimizer = trained()
    owners = memory_owners(model, optimizer, CPU, 2_000_000)
    assert owners == {"optimizer states": 800_004, "parameters": 400_000, "gradients": 400_000,
                      errors.ACTIVATIONS: 399_996}
    assert list(owners.values()) == sorted(owners.values(), reverse=True)
    assert errors.ACTIVATIONS not in memory_owners(model, optimizer, CPU, None)
    optimizer.zero_grad(set_to_none=True)
    assert memory_owners(model, optimizer, CPU, None)["gradients"] == 0
    # with fsdp_cpu_offload the model is in another memory than that which ran out
    offloaded = memory_owners(model, optimizer, torch.device("cuda"), 5 * GIB)
    assert offloaded[errors.ACTIVATIONS] == 5 * GIB and offloaded["parameters"] == 0


def test_large_activations_want_a_smaller_batch():
    assert message(lambda: {errors.ACTIVATIONS: 70 * GIB, "optimizer states": GIB, "gradients": 0}) == (
        "out of memory: use a smaller batch_size or block_size or model, or --activation_checkpointing=block "
        "or --use_fsdp (CUDA out of memory. Tried to allocate 2.00 GiB.); at the peak: "
        "activations and temporary tensors 70.00 GiB, optimizer states 1.00 GiB")


def test_a_large_model_wants_to_be_divided():
    owners = {"optimizer states": 40 * GIB, "parameters": 20 * GIB, errors.ACTIVATIONS: 3 * GIB}
    assert message(lambda: owners).startswith(
        "out of memory: use a smaller model or batch_size or block_size, or --use_fsdp or --use_zero1 or "
        "--activation_checkpointing=block (CUDA out of memory.")
    assert message(lambda: owners, ("device_batch_size", "batch_size", "sequence_length")).startswith(
        "out of memory: use a smaller model or device_batch_size or sequence_length (CUDA out of memory.")


def test_a_report_that_fails_does_not_hide_the_error():
    assert message(lambda: 1 / 0).endswith("use_fsdp (CUDA out of memory. Tried to allocate 2.00 GiB.)")


def test_the_message_names_the_owners_of_a_watched_model():
    watch_memory(*trained(), CPU)
    text = errors._message_for_user(MemoryError, MemoryError("no room"), SETTINGS)
    assert text.endswith("(no room); in memory: optimizer states 0.00 GiB, parameters 0.00 GiB, "
                         "gradients 0.00 GiB")
    assert "\n" not in text
