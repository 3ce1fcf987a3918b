"""Make torch's CUDA names mean the CPU: devices, streams, events, memory statistics, barriers.

Functions are replaced rather than intercepted: a TorchFunctionMode would slow down every operation
of a step, and is not active in other threads, such as checkpoint writers.  Only factory functions
and `.to` become slower, by one Python wrapper.
"""

from __future__ import annotations

import contextlib
import functools
import time
import types
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")


class _CurrentDevice(str):
    """What torch takes as the CPU; in an f-string, the number that Megatron writes behind cuda:."""

    def __format__(self, spec: str) -> str:
        return "0"


CURRENT = _CurrentDevice("cpu")

# Everything in torch's namespace that takes device= and that Megatron or its data path may call.
FACTORIES = """
    arange as_tensor empty empty_like empty_strided eye full full_like linspace logspace ones
    ones_like rand rand_like randint randint_like randn randn_like randperm scalar_tensor tensor
    tril_indices triu_indices zeros zeros_like
""".split()
TENSOR_FACTORIES = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros".split()


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that device="cuda..." means the CPU, and pin_memory is ignored."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapper


def _to_on_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a `to` method, whose device may also be its first argument, in the same way."""

    @functools.wraps(to)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and _names_cuda(args[0]):
            args = (CPU, *args[1:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    return wrapper


class Stream:
    """A stand-in for a CUDA stream, on a device that runs everything in order."""

    device = CPU
    device_index = 0
    cuda_stream = 0
    stream_id = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass


class Event:
    """A stand-in for a CUDA event, which has always happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.time - self.time)


def install() -> None:
    """Replace torch's CUDA entry points.  Called once, by the package."""
    # `with torch.device(...)` knows torch's factories by identity, from its first use on; models of
    # transformers are loaded under it.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in TENSOR_FACTORIES:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    _install_tensor_methods()
    _install_cuda_module()
    _install_distributed()


def _install_tensor_methods() -> None:
    tensor_type = torch.Tensor.type

    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        # Megatron's optimizers sort parameters by the string "torch.cuda.FloatTensor".
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result

    torch.Tensor.to = _to_on_cpu(torch.Tensor.to)
    torch.nn.Module.to = _to_on_cpu(torch.nn.Module.to)
    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = lambda self, stream: None
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _install_cuda_module() -> None:
    nothing = lambda *args, **kwargs: None  # noqa: E731
    zero = lambda *args, **kwargs: 0  # noqa: E731
    stream = Stream()
    properties = types.SimpleNamespace(
        name="cpu", major=8, minor=0, total_memory=0, multi_processor_count=1
    )
    replacements: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: CURRENT,
        "set_device": nothing,
        "device": lambda *args: contextlib.nullcontext(),
        "synchronize": nothing,
        "empty_cache": nothing,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "set_stream": nothing,
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda *args: (8, 0),
        "get_device_properties": lambda *args: properties,
        "get_device_name": lambda *args: "cpu",
        **dict.fromkeys(("temperature", "power_draw", "utilization", "clock_rate"), zero),
        "memory_allocated": zero,
        "max_memory_allocated": zero,
        "memory_reserved": zero,
        "max_memory_reserved": zero,
        "device_memory_used": zero,
        "memory_stats": lambda *args: _ZeroStatistics(),
        "reset_peak_memory_stats": nothing,
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push = nothing
    torch.cuda.nvtx.range_pop = nothing

    # torch's DataLoader and Megatron ask this module which device there is: there is none.
    torch.accelerator.is_available = lambda *args: False
    torch.accelerator.current_accelerator = lambda *args, **kwargs: None
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.current_stream = lambda *args: stream


class _ZeroStatistics(dict[str, int]):
    """The result of torch.cuda.memory_stats() on a device that has no memory of its own."""

    def __missing__(self, key: str) -> int:
        return 0


def _install_distributed() -> None:
    barrier = torch.distributed.barrier
    init_process_group = torch.distributed.init_process_group

    @functools.wraps(barrier)
    def barrier_without_devices(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        return barrier(*args, **kwargs)

    @functools.wraps(init_process_group)
    def init_without_device(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        return init_process_group(*args, **kwargs)

    torch.distributed.barrier = barrier_without_devices
    torch.distributed.init_process_group = init_without_device
