"""Models whose weights ranks share: what `test_sharded.py` runs on every rank."""

import math
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import NEVER, adopt, hits, plain
from launch import everywhere
from solving import ADAPTIVE, EASY, FIRST_BLOCK, as_alone, identical, solve
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor import parallel as tensor_parallel

import fxcache
from fxcache import FirstBlockCache, StepSchedule


class Block(nn.Module):
    """Attention and an MLP; `group` are the ranks that hold the other tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.group: Any = None

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        x = self.norm(h)
        heads = (
            layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        q, k, v = heads
        if self.group is not None:
            gather = torch.distributed._functional_collectives.all_gather_tensor
            k, v = (gather(each.contiguous(), 2, self.group) for each in (k, v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + self.o(attended)
        return h + self.down(nn.functional.gelu(self.up(self.norm2(h))))


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(4, width), nn.Linear(1, width)
        self.blocks, self.out = nn.ModuleList(Block(width) for _ in "12"), nn.Linear(width, 4)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor | None = None
    ) -> torch.Tensor:
        h = self.embed(x) + self.time(t[:, None])[:, None]
        if context is not None:
            h = h + 0.01 * context.mean()
        for block in self.blocks:
            h = block(h)
        return self.out(h)


Put = Callable[[nn.Module], Any]


def net(put: Put | None = None, width: int = 32) -> Net:
    torch.manual_seed(0)
    model = Net(width).eval()
    if put is not None:
        put(model)
    return model


def net_at(step: int) -> dict[str, Any]:
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(99))
    moved = x + 0.05 * step * torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(step))
    return {"x": moved, "t": torch.full((2,), 1 - 0.05 * step)}


def compared(model: nn.Module, *policies: Any) -> Any:
    """A denoiser of `model`, which ranks share: it gives the model's bits, and decides as alone."""
    denoiser: Any = plain(model, NEVER)
    identical(denoiser, model, net_at)
    for policy in policies:
        as_alone(denoiser, policy, net(), net_at)
    return denoiser


def shared_later(put: Put, *policies: Any) -> None:
    """A denoiser that was captured already, and then one of the model that is given back."""
    denoiser = plain(net(), NEVER)
    expected = solve(denoiser, net_at)
    put(denoiser)
    torch.testing.assert_close(solve(denoiser, net_at), expected, atol=1e-5, rtol=1e-4)
    compared(fxcache.restore(denoiser), *policies)


COLUMN, ROW = tensor_parallel.ColwiseParallel, tensor_parallel.RowwiseParallel


def split_layers(model: nn.Module, mesh: Any = None) -> None:
    """Tensor parallelism, heads and hidden units by rank."""
    mesh = mesh or init_device_mesh("cpu", (distributed.get_world_size(),))
    plan = {name: COLUMN() for name in ("q", "k", "v", "up")} | {"o": ROW(), "down": ROW()}
    for block in model.blocks:
        tensor_parallel.parallelize_module(block, mesh, dict(plan))


def split_tokens(model: nn.Module) -> None:
    """The same, with the stream between blocks split by tokens (sequence parallelism)."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    plan: dict[str, Any] = {name: COLUMN(input_layouts=Shard(1)) for name in ("q", "k", "v", "up")}
    plan |= {n: ROW(output_layouts=Shard(1), use_local_output=False) for n in ("o", "down")}
    plan |= {n: tensor_parallel.SequenceParallel() for n in ("norm", "norm2")}
    for block in model.blocks:
        tensor_parallel.parallelize_module(block, mesh, dict(plan))
    out = tensor_parallel.PrepareModuleOutput
    given = {"output_layouts": Replicate(), "use_local_output": False}
    ends: dict[str, Any] = {
        "embed": out(desired_output_layouts=Shard(1), **given),
        "time": out(desired_output_layouts=Replicate(), **given),
        "out": tensor_parallel.PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
        ),
    }
    tensor_parallel.parallelize_module(model, mesh, ends)


def tensors() -> None:
    shared_later(split_layers, FIRST_BLOCK, ADAPTIVE)
    compared(net(split_tokens), FIRST_BLOCK)


def tensors_compiled() -> None:
    model = net(split_layers)
    denoiser = fxcache.transform(model, NEVER)
    outputs = solve(denoiser, net_at)
    torch.testing.assert_close(outputs, solve(model, net_at), atol=1e-5, rtol=1e-5)
    as_alone(denoiser, FIRST_BLOCK, net(), net_at)


def tensors_and_context() -> None:
    """On four ranks: two hold the heads, two the tokens."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "cp"))
    model, mine = net(lambda model: split_layers(model, mesh["tp"])), mesh.get_local_rank("cp")
    for block in model.blocks:
        block.group = mesh.get_group("cp")

    def part(whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(2, dim=1)[mine]

    def at(step: int) -> dict[str, Any]:
        given = net_at(step)
        return {**given, "x": part(given["x"])}

    denoiser = plain(model, NEVER)
    identical(denoiser, model, at)
    for policy in (FIRST_BLOCK, ADAPTIVE):
        as_alone(denoiser, policy, net(), net_at, at, part)


def shard_blocks(model: nn.Module, **options: Any) -> None:
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)


def sharded() -> None:
    """FSDP of the whole, and of each block: before and after transform."""
    # `explain` calls a model as others do: its root's hooks gather what they must.
    assert "2 blocks in blocks (2)" in str(fxcache.explain(net(fully_shard), **net_at(0)))
    compared(net(fully_shard), FIRST_BLOCK)
    denoiser = compared(net(shard_blocks), FIRST_BLOCK, ADAPTIVE, EASY)
    denoiser.unshard(), denoiser.reshard()  # FSDP's own methods go on working
    shared_later(fully_shard)
    shared_later(shard_blocks)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    compared(net(lambda model: shard_blocks(model, mp_policy=half)))


def sharded_costs() -> None:
    """A hit gathers nothing of the span, and holds nothing of it in memory."""
    model = net(shard_blocks, width=128)
    denoiser: Any = plain(model, StepSchedule(mask=(False, False, True, True)))
    of_block = sum(4 * p.numel() for p in net(width=128).blocks[0].parameters())
    counts, allocated = [], []
    with torch.no_grad(), denoiser.trajectory(4):
        denoiser(**net_at(0))  # is traced
        for step in range(1, 4):
            with torch.profiler.profile(profile_memory=True) as profiled:
                denoiser(**net_at(step))
            events = profiled.key_averages()
            gathers = [e.count for e in events if e.key.endswith("::all_gather_into_tensor")]
            counts.append(sum(gathers))
            allocated.append(sum(max(0, e.self_cpu_memory_usage) for e in events))
    assert hits(denoiser) == [False, False, True, True]
    weights = len(list(model.blocks.parameters()))
    assert counts == [weights, 0, 0], counts
    assert allocated[0] > 2 * of_block > of_block > allocated[2], (allocated, of_block)


def changed() -> None:
    """Whoever writes into weights that ranks share is seen, amid a trajectory as well."""
    for put in (split_layers, shard_blocks):
        whole, model = net(), net(put)
        denoiser: Any = plain(model)
        if put is shard_blocks:
            trained(whole, denoiser)
            denoiser.reset()
        written(model, denoiser)
    moved(whole, model, adopt(denoiser, NEVER))


def trained(whole: nn.Module, denoiser: Any) -> None:
    """Gradients are FSDP's, and an optimizer's step amid a trajectory is seen."""
    with torch.no_grad():
        denoiser(**net_at(0)), denoiser(**net_at(1))
    for each in (whole, denoiser):
        each(**net_at(2)).square().sum().backward()
    for mine, theirs in zip(denoiser.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, atol=1e-5, rtol=1e-4)
    for each in (whole, denoiser):
        torch.optim.SGD(each.parameters(), 0.01).step()
    with torch.no_grad():
        torch.testing.assert_close(denoiser(**net_at(3)), whole(**net_at(3)), atol=1e-5, rtol=1e-4)
    assert hits(denoiser) == [False, True, False]


def written(model: nn.Module, denoiser: Any) -> None:
    weight = model.blocks[1].up.weight
    before = {name: value.clone() for name, value in model.blocks.state_dict().items()}

    def stepped() -> None:
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], 0.01).step()
        weight.grad = None

    writes: list[Callable[[], Any]] = [
        lambda: weight.mul_(1.1),
        stepped,
        lambda: model.blocks.load_state_dict(before),
    ]
    with torch.no_grad():
        denoiser(**net_at(0))
        for step, write in enumerate(writes):
            denoiser(**net_at(2 * step + 1))
            write()
            denoiser(**net_at(2 * step + 2))
    assert hits(denoiser) == [False, *[True, False] * 3]


def moved(whole: nn.Module, model: nn.Module, denoiser: Any) -> None:
    """Layers of a sharded block that somebody wraps after it was captured, as adapters do."""

    class Adapter(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x)

    expected = solve(whole, net_at)
    for change in (None, lambda layer: Adapter(layer), lambda layer: layer.base_layer):
        for block in model.blocks if change is not None else ():
            block.q = change(block.q)
        torch.testing.assert_close(solve(denoiser, net_at), expected, atol=1e-5, rtol=1e-4)


@mock.patch.dict(os.environ, FXCACHE_CHECK_RANKS="1")
def votes_apart() -> None:
    """Ranks that vote, at other steps of trajectories of other lengths: nobody waits for ever."""
    control = FirstBlockCache(threshold=math.inf, control_threshold=0.25)
    length, context = (8, 5)[distributed.get_rank()], torch.ones(2, 3)
    denoiser: Any = plain(net(shard_blocks), sync=distributed.group.WORLD)
    for policy in (FIRST_BLOCK, ADAPTIVE, EASY, control):
        adopt(denoiser, policy)
        with torch.no_grad():
            for first in range(0, 24, length):
                with denoiser.trajectory(length):
                    for step in range(min(length, 24 - first)):
                        denoiser(**net_at(step), context=context)
        first, second = everywhere(hits(denoiser))
        assert first == second, (policy, first, second)


def refused() -> None:
    """What cannot be captured is named; what is around a model as well."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))

    def offloaded(model: nn.Module) -> None:
        shard_blocks(model, offload_policy=CPUOffloadPolicy(False))

    def both(model: nn.Module) -> None:
        split_layers(model, mesh["tp"])
        shard_blocks(model, mesh=mesh["dp"])

    def prefetched(model: nn.Module) -> None:
        shard_blocks(model)
        model.set_modules_to_forward_prefetch([model.blocks[0]])

    for put, named in (
        (offloaded, r"blocks\.0.*offload_policy"),
        (both, r"blocks\.0.*tensor parallelism"),
        (prefetched, r"set_modules_to_forward_prefetch\(\[\]\)"),
    ):
        with pytest.raises(fxcache.CaptureError, match=named):
            solve(plain(net(put), NEVER), net_at)
    with pytest.raises(fxcache.FxCacheError, match="transform the Net"):
        fxcache.transform(nn.parallel.DistributedDataParallel(net()), NEVER)
    denoiser = plain(net(), ADAPTIVE)
    solve(nn.parallel.DistributedDataParallel(denoiser), net_at)
    assert denoiser.report().hits
