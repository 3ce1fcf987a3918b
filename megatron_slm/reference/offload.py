"""A frozen model whose weights stay in host memory and visit the device when they are needed.

    host     every layer's weights, one pinned buffer each (of a power of two of bytes, in torch)
    device   two buffers of the largest layer's size: one computes, the other is filled meanwhile;
             between passes one of them has the first layer
    begin()  embedding, last norm and output layer come for the whole pass, and leave at end().
             The pass waits for the embedding at once, for the others after its last layer

A pass moves the weights once for each batch it scores, so batches should be large
(--slm-reference-micro-batch-size): the copy hides behind the computation when a layer's 2 bytes a
parameter over the bus take no longer than 2 FLOPs a parameter and token, which at 50 GB/s and
400 TFLOP/s is from 8,000 tokens on.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

ALIGNMENT = 512  # bytes, as torch's allocator aligns


class StreamedLayers:
    """Takes the weights of a model off the device.  Call begin() before its forward passes, end()
    after them."""

    def __init__(self, model: GPTModel) -> None:
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
        self.ends_ready = [torch.cuda.Event(), torch.cuda.Event()]  # as in ends
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())  # what the buffers' memory was before
        self.buffer_of: dict[int, int] = {}  # of layers on the device
        self.fetched = 0
        for number, layer in enumerate(model.decoder.layers):
            layer.register_forward_pre_hook(partial(self._before, number))
            layer.register_forward_hook(partial(self._after, number))

    def begin(self) -> None:
        """Bring what is not in a layer."""
        current = torch.cuda.current_stream()
        # Their memory is torch's, which may have lent it to what the device still computes.
        wholes = [torch.empty_like(end.host, device=self.buffers[0].device) for end in self.ends]
        self.stream.wait_stream(current)
        for end, whole, ready in zip(self.ends, wholes, self.ends_ready, strict=True):
            with torch.cuda.stream(self.stream):
                whole.copy_(end.host, non_blocking=True)
                ready.record(self.stream)
            end.place(whole)
        current.wait_event(self.ends_ready[0])

    def end(self) -> None:
        """Leave nothing on the device but the two buffers."""
        # Whoever has the memory next must not be overtaken by a copy.
        torch.cuda.current_stream().wait_event(self.ends_ready[1])
        for end in self.ends:
            end.leave()

    def _before(self, number: int, *_: Any) -> None:
        self._fetch(number)
        torch.cuda.current_stream().wait_event(self.ready[self.buffer_of[number]])
        # After the last layer comes the first, of the next batch or of the next pass.
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
            self.stream.wait_event(self.free[index])  # by the layer that was in it
            self.buffers[index][: layer.host.numel()].copy_(layer.host, non_blocking=True)
            self.ready[index].record(self.stream)
        layer.place(self.buffers[index])
        self.buffer_of[number] = index


class _Buffer:
    """Parameters, their bytes in host memory, and where each one's begin there."""

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
        """Let the parameters be these bytes."""
        for view, parameter in zip(self._views(buffer), self.parameters, strict=True):
            parameter.data = view

    def leave(self) -> None:
        """Let the parameters be nothing."""
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
