"""A small model whose layers stream, with streams that keep a record of what is done on them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_slm import cpu_platform

cpu_platform.install()

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module, ModuleList
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_slm.reference import offload

LAYERS, WIDTH = 3, 8


class Stream:
    """Notes what it waits for, and copies made while it is the current one."""

    def __init__(self, *_: Any) -> None:
        self.done: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.done.append(("waits", event))

    def wait_stream(self, stream: Stream) -> None:
        self.done.append(("waits", stream))


class Event:
    def record(self, stream: Stream) -> None:
        pass


class Streams(TorchDispatchMode):
    """The main stream and whichever is current; copies of host buffers are noted by these."""

    def __init__(self) -> None:
        super().__init__()
        self.main = self.current = Stream()
        self.hosts: dict[int, str] = {}

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten.copy_.default and args[1].data_ptr() in self.hosts:
            self.current.done.append(self.hosts[args[1].data_ptr()])
        return function(*args, **(kwargs or {}))


class Model(Module):
    """As much of a GPTModel as the streaming looks at."""

    pre_process = True

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding(16, WIDTH)
        self.decoder = Module()
        self.decoder.layers = ModuleList(Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.output_layer = Linear(WIDTH, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.decoder.layers:
            hidden = layer(hidden)
        # Not called, as by the chunked head.
        return hidden @ self.output_layer.weight.t() + self.output_layer.bias


def main() -> None:
    """Three passes, the second of two batches."""
    model = Model().requires_grad_(False)
    tokens = torch.arange(16)
    expected = model(tokens)
    streams = Streams()
    vars(torch.cuda).update(
        Stream=Stream, Event=Event, stream=streams.stream, current_stream=lambda: streams.main
    )
    streamed = offload.StreamedLayers(model)
    named = [(f"layer {number}", layer) for number, layer in enumerate(streamed.layers)]
    named += zip(("embedding", "others"), streamed.ends, strict=True)
    streams.hosts = {buffer.host.data_ptr(): name for name, buffer in named}
    side = streamed.stream
    assert isinstance(side, Stream)
    layers = [f"layer {number}" for number in range(LAYERS)]
    with streams:
        for batches, copied in ((1, [*layers, "layer 0"]), (2, 2 * layers), (1, layers)):
            side.done.clear()
            streams.main.done.clear()
            streamed.begin()
            for _ in range(batches):
                torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0)
            streamed.end()
            # Nothing is copied twice: the first layer is left for the next pass.
            copies = [one for one in side.done if isinstance(one, str)]
            assert copies[:2] == ["embedding", "others"]
            assert sorted(copies[2:]) == sorted(copied), copies
            # Nothing on the main stream, which waits for the output layer after the last layer.
            waited = [what for _, what in streams.main.done]
            assert waited[0] is streamed.ends_ready[0]
            assert streamed.ends_ready[1] not in waited[: 1 + LAYERS]
            assert waited[1 + LAYERS] is streamed.ends_ready[1]
            assert not model.embedding.weight.numel() and not model.output_layer.weight.numel()
    assert list(streamed.buffer_of) == [0]
    print("as expected")


if __name__ == "__main__":
    sys.exit(main())
