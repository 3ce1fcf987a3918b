"""Run by test_platform.py in a process of its own, since the platform cannot be taken back."""

from __future__ import annotations

import torch

real_to = torch.Tensor.to

from megatron_slm import cpu_platform

cpu_platform.install()
once = torch.Tensor.to
cpu_platform.install()
assert once is torch.Tensor.to is not real_to, "a second install must do nothing"

# Devices by every name.
for device in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)):
    assert torch.zeros(2, device=device).device.type == "cpu"
    assert torch.ones(2).to(device).device.type == "cpu"
    assert torch.ones(2).to(device=device).device.type == "cpu"
    assert torch.ones(2).new_zeros(3, device=device).device.type == "cpu"
    assert torch.nn.Linear(2, 2).to(device).weight.device.type == "cpu"
assert torch.tensor([1], device=torch.cuda.current_device()).device.type == "cpu"
with torch.device("meta"):
    assert torch.empty(2).is_meta and torch.arange(2).is_meta
assert torch.empty(3, pin_memory=True).shape == (3,)
assert torch.ones(1).pin_memory().cuda(non_blocking=True).device.type == "cpu"

# Megatron sorts parameters by these strings.
assert torch.ones(1).type() == "torch.cuda.FloatTensor"
assert torch.ones(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
assert torch.ones(1).type(torch.float64).dtype == torch.float64

# Streams and events.
stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
stream.wait_stream(torch.cuda.current_stream())
event.record()
with torch.cuda.stream(stream):
    event.synchronize()
assert event.query() and event.elapsed_time(event) == 0.0
assert not torch.accelerator.is_available()
assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] == 0

# "The CUDA RNG" is a generator of its own: neither seeds nor draws of one touch the other.
torch.manual_seed(1)
torch.cuda.manual_seed(5)
first = torch.nn.functional.dropout(torch.ones(100), 0.5)
cpu_state = torch.get_rng_state()
torch.cuda.manual_seed(5)
assert torch.equal(torch.get_rng_state(), cpu_state)
torch.rand(10)
assert torch.equal(first, torch.nn.functional.dropout(torch.ones(100), 0.5))
saved = torch.cuda.get_rng_state()
second = torch.nn.functional.dropout(torch.ones(100), 0.5)
torch.cuda.set_rng_state(saved)
assert torch.equal(second, torch.nn.functional.dropout(torch.ones(100), 0.5))
kept = torch.nn.functional.dropout(torch.ones(100_000), 0.25)
assert abs((kept > 0).float().mean() - 0.75) < 0.01 and abs(kept.mean() - 1.0) < 0.01

# Barriers and groups that name a device.
torch.distributed.init_process_group(
    "gloo",
    store=torch.distributed.HashStore(),
    rank=0,
    world_size=1,
    device_id=torch.device("cuda", 0),
)
torch.distributed.barrier(device_ids=[0])

# FusedAdam is AdamW with its step count in the parameter group.
from megatron_slm.cpu_platform.optimizer import FusedAdam

for adam_w_mode, reference in ((True, torch.optim.AdamW), (False, torch.optim.Adam)):
    mine, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    own = FusedAdam([mine], adam_w_mode=adam_w_mode, **settings)
    other = reference([theirs], **settings)
    for step in range(5):
        for parameter, optimizer in ((mine, own), (theirs, other)):
            parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert own.param_groups[0]["step"] == 5
    assert set(own.state[mine]) == {"exp_avg", "exp_avg_sq"}

# What another process writes is a copy, which training does not change meanwhile.
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

shared = torch.zeros(3).share_memory_()
((_, _, (_, [(_, copied)])),) = FileSystemWriterAsync.preload_tensors(
    [("file", "key", ([], [("item", shared)]))]
)
shared += 1.0
assert not copied.any()
print("all right")
