"""Keep a frozen model's weights in host memory, and copy them to the device when they are needed.

    host     holds each layer's weights in a pinned buffer (torch rounds its size up to a power of
             two)
    device   holds two buffers of the largest layer's size: while a layer computes in one, the other
             is filled with the next; between passes, one of them holds the first layer
    begin()  copies embedding, last norm and output layer for the whole pass, and end() drops them;
             the pass waits for the embedding at once, and for the others after its last layer

A pass copies the weights once for each batch that it scores, so batches should be large
(--slm-reference-micro-batch-size).  The copy hides behind the computation if moving a layer's 2
bytes a parameter over the bus takes no longer than 2 FLOPs for each parameter and token; at 50 GB/s
and 400 TFLOP/s, this is so from 8,000 tokens on.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 512  # bytes, the alignment of torch's allocator


class StreamedLayers:
    """Keeps the weights of a model off the device.

    begin() must be called before the model's forward passes, and end() after them.
    """

    def __init__(self, model: Any) -> None:
        self.layers = [_Buffer(list(layer.parameters())) for layer in model.decoder.layers]
        embedding = list(model.embedding.parameters()) if model.pre_process else []
        placed = {id(p) for layer in self.layers for p in layer.parameters} | set(
            map(id, embedding)
        )
        # A tied output layer's weight is the embedding's.
        others = [parameter for parameter in model.parameters() if id(parameter) not in placed]
        self.ends = [_Buffer(embedding), _Buffer(others)]
        size = max(layer.host.numel() for layer in self.layers)
        device = torch.cuda.current_device()
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.free = [torch.cuda.Event(), torch.cuda.Event()]
        self.ready = [torch.cuda.Event(), torch.cuda.Event()]
        self.ends_ready = [torch.cuda.Event(), torch.cuda.Event()]  # for each of self.ends
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())  # it may still use the memory
        self.buffer_of: dict[int, int] = {}  # the buffer of each layer on the device
        self.fetched = 0
        for number, layer in enumerate(model.decoder.layers):
            layer.register_forward_pre_hook(partial(self._before, number))
            layer.register_forward_hook(partial(self._after, number))

    def begin(self) -> None:
        """Copy to the device what does not belong to a layer."""
        current = torch.cuda.current_stream()
        # This memory is from torch's allocator, and the device may still compute with it.
        wholes = [torch.empty_like(end.host, device=self.buffers[0].device) for end in self.ends]
        self.stream.wait_stream(current)
        for end, whole, ready in zip(self.ends, wholes, self.ends_ready, strict=True):
            with torch.cuda.stream(self.stream):
                whole.copy_(end.host, non_blocking=True)
                ready.record(self.stream)
            end.place(whole)
        current.wait_event(self.ends_ready[0])

    def end(self) -> None:
        """Take everything but the two buffers off the device."""
        # A copy must not overwrite what uses the memory next.
        torch.cuda.current_stream().wait_event(self.ends_ready[1])
        for end in self.ends:
            end.leave()

    def _before(self, number: int, *_: Any) -> None:
        self._fetch(number)
        torch.cuda.current_stream().wait_event(self.ready[self.buffer_of[number]])
        # The last layer is followed by the first, for the next batch or the next pass.
        self._fetch((number + 1) % len(self.layers))

    def _after(self, number: int, *_: Any) -> None:
        self.free[self.buffer_of.pop(number)].record(torch.cuda.current_stream())
        self.layers[number].leave()
        if number == len(self.layers) - 1:
            torch.cuda.current_stream().wait_event(self.ends_ready[1])

    def _fetch(self, number: int) -> None:
        if number in self.buffer_of:
            return
        index = self.fetched % 2
        self.fetched += 1
        layer = self.layers[number]
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.free[index])  # until the layer that was in it has computed
            self.buffers[index][: layer.host.numel()].copy_(layer.host, non_blocking=True)
            self.ready[index].record(self.stream)
        layer.place(self.buffers[index])
        self.buffer_of[number] = index


class _Buffer:
    """Parameters, with their bytes in host memory, and where the bytes of each one start."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.shapes = [parameter.shape for parameter in parameters]
        self.starts: list[int] = []
        size = 0
        for parameter in parameters:
            self.starts.append(size)
            size += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
        self.host = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        for view, parameter in zip(self._views(self.host), parameters, strict=True):
            view.copy_(parameter.detach())
        self.leave()

    def place(self, buffer: Tensor) -> None:
        """Make the parameters views of a buffer on the device."""
        for view, parameter in zip(self._views(buffer), self.parameters, strict=True):
            parameter.data = view

    def leave(self) -> None:
        """Make the parameters empty."""
        for parameter in self.parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[start : start + shape.numel() * parameter.dtype.itemsize]
            .view(parameter.dtype)
            .view(shape)
            for start, shape, parameter in zip(
                self.starts, self.shapes, self.parameters, strict=True
            )
        ]
