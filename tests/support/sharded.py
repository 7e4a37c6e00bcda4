"""Models whose weights ranks share: what `test_sharded.py` runs on every rank."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from launch import everywhere
from solving import NEVER, POLICIES, alone, compare, decided, solve
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor import parallel as tensor_parallel

import fxcache
from fxcache import AdaptiveCache, FirstBlockCache, StepSchedule


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
    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embed, self.time, self.out = (
            nn.Linear(4, width),
            nn.Linear(1, width),
            nn.Linear(width, 4),
        )
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor | None = None
    ) -> torch.Tensor:
        h = self.embed(x) + self.time(t[:, None])[:, None]
        if context is not None:
            h = h + 0.01 * context.mean()
        for block in self.blocks:
            h = block(h)
        return self.out(h)


def net(**config: Any) -> Net:
    torch.manual_seed(0)
    return Net(**config).eval()


def net_at(step: int) -> dict[str, Any]:
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(99))
    moved = x + 0.05 * step * torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(step))
    return {"x": moved, "t": torch.full((2,), 1 - 0.05 * step)}


def share(
    put: Callable[[nn.Module], Any], *, before: bool = False, backend: str = "eager"
) -> tuple[Net, Any, list[torch.Tensor]]:
    """A net, a denoiser of one that `put` was used on, and what that gives."""
    model = net()
    denoiser = fxcache.transform(model, NEVER, backend=backend) if before else None
    if before:  # it has been captured already
        expected = solve(denoiser, net_at)
        put(denoiser)
        torch.testing.assert_close(solve(denoiser, net_at), expected, atol=1e-5, rtol=1e-4)
        model = fxcache.restore(denoiser)
    else:
        put(model)
    plain = solve(model, net_at)
    return net(), fxcache.transform(model, NEVER, backend=backend), plain


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
    for put, policies in ((split_layers, POLICIES), (split_tokens, POLICIES[:1])):
        whole, denoiser, plain = share(put)
        compare(whole, denoiser, plain, net_at, policies=policies)
    whole, denoiser, plain = share(split_layers, before=True)
    assert all(map(torch.equal, solve(denoiser, net_at), plain))


def tensors_compiled() -> None:
    whole, denoiser, plain = share(split_layers, backend="inductor")
    compare(whole, denoiser, plain, net_at, is_eager=False)


def tensors_and_context() -> None:
    """On four ranks: two hold the heads, two the tokens."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "cp"))
    whole, model, mine = net(), net(), mesh.get_local_rank("cp")
    split_layers(model, mesh["tp"])
    for block in model.blocks:
        block.group = mesh.get_group("cp")

    def at(step: int) -> dict[str, Any]:
        given = net_at(step)
        return {**given, "x": given["x"].chunk(2, dim=1)[mine]}

    plain = solve(model, at)
    for policy in POLICIES[:2]:
        denoiser: Any = fxcache.transform(model, NEVER, backend="eager")
        assert all(map(torch.equal, solve(denoiser, at), plain))
        denoiser.policy = policy
        denoiser.reset()
        got, (expected, decisions) = solve(denoiser, at), alone(whole, policy, net_at)
        assert everywhere(decided(denoiser)) == [decisions] * 4
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other.chunk(2, dim=1)[mine], atol=1e-5, rtol=1e-4)


def shard_blocks(model: nn.Module, **options: Any) -> None:
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)


def sharded() -> None:
    """FSDP of the whole, and of each block: before and after transform."""
    for put, policies in ((fully_shard, POLICIES[:1]), (shard_blocks, POLICIES)):
        whole, denoiser, plain = share(put)
        compare(whole, denoiser, plain, net_at, policies=policies)
        denoiser.unshard(), denoiser.reshard()  # FSDP's own methods go on working
        whole, denoiser, plain = share(put, before=True)
        assert all(map(torch.equal, solve(denoiser, net_at), plain))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    _, denoiser, plain = share(lambda model: shard_blocks(model, mp_policy=half))
    assert all(map(torch.equal, solve(denoiser, net_at), plain))


def sharded_costs() -> None:
    """A hit gathers nothing of the span, and holds nothing of it in memory."""
    model = net(width=128, depth=4)
    shard_blocks(model)
    schedule = StepSchedule(mask=(False, False, True, True))
    denoiser: Any = fxcache.transform(model, schedule, backend="eager")
    of_block = sum(4 * p.numel() for p in net(width=128).blocks[0].parameters())
    counts, allocated = [], []
    with torch.no_grad(), denoiser.trajectory(4):
        for step in range(4):
            with torch.profiler.profile(profile_memory=True) as profiled:
                denoiser(**net_at(step))
            events = profiled.key_averages()
            gathers = [e.count for e in events if e.key.endswith("::all_gather_into_tensor")]
            counts.append(sum(gathers))
            allocated.append(sum(max(0, e.self_cpu_memory_usage) for e in events))
    assert decided(denoiser) == [False, False, True, True]
    weights = len(list(model.blocks.parameters()))
    assert counts[1:] == [weights, 0, 0], counts
    assert allocated[1] > 4 * of_block > of_block > allocated[3], (allocated, of_block)


def sharded_training() -> None:
    """Gradients are FSDP's, and an optimizer's step amid a trajectory is seen."""
    whole, model = net(), net()
    shard_blocks(model)
    denoiser: Any = fxcache.transform(model, FirstBlockCache(threshold=math.inf), backend="eager")
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
        assert decided(denoiser) == [False, True, False]


def written() -> None:
    """Whoever writes into weights that ranks share is seen, amid a trajectory as well."""
    for put in (split_layers, shard_blocks):
        model = net()
        put(model)
        denoiser: Any = fxcache.transform(
            model, FirstBlockCache(threshold=math.inf), backend="eager"
        )
        weight = model.blocks[1].up.weight
        before = {name: value.clone() for name, value in model.blocks.state_dict().items()}

        def trained(model: nn.Module = model, weight: Any = weight) -> None:
            weight.grad = torch.ones_like(weight)
            torch.optim.SGD([weight], 0.01).step()
            weight.grad = None

        writes: list[Callable[[], Any]] = [
            lambda weight=weight: weight.mul_(1.1),
            trained,
            lambda model=model, before=before: model.blocks.load_state_dict(before),
        ]
        with torch.no_grad():
            denoiser(**net_at(0))
            for step, write in enumerate(writes):
                denoiser(**net_at(2 * step + 1))
                write()
                denoiser(**net_at(2 * step + 2))
        assert decided(denoiser) == [False, *[True, False] * 3], (put, decided(denoiser))


def moved() -> None:
    """Layers of a sharded block that somebody wraps after it was captured, as adapters do."""

    class Adapter(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x)

    whole, model = net(), net()
    shard_blocks(model)
    denoiser: Any = fxcache.transform(model, NEVER, backend="eager")
    expected = solve(whole, net_at)
    for change in (None, lambda layer: Adapter(layer), lambda layer: layer.base_layer):
        for block in model.blocks if change is not None else ():
            block.q = change(block.q)
        torch.testing.assert_close(solve(denoiser, net_at), expected, atol=1e-5, rtol=1e-4)


def votes_apart() -> None:
    """Ranks that vote, at other steps of trajectories of other lengths: nobody waits for ever."""
    control = FirstBlockCache(threshold=math.inf, control_threshold=0.25)
    length, context = (8, 5)[distributed.get_rank()], torch.ones(2, 3)
    for policy in (*POLICIES, control):
        model = net()
        shard_blocks(model)
        denoiser: Any = fxcache.transform(
            model, policy, backend="eager", sync=distributed.group.WORLD
        )
        with torch.no_grad():
            for evaluation in range(24):
                if evaluation % length == 0:
                    told = denoiser.trajectory(length)
                    told.__enter__()
                denoiser(**net_at(evaluation % length), context=context)
                if evaluation % length == length - 1 or evaluation == 23:
                    told.__exit__(None, None, None)
        first, second = everywhere(decided(denoiser))
        assert first == second, (policy, first, second)


def explained() -> None:
    """`explain` calls a model as others do: its root's hooks gather what they must."""
    for put in (fully_shard, shard_blocks):
        model = net()
        put(model)
        assert "3 blocks in blocks (3)" in str(fxcache.explain(model, **net_at(0)))


def refused() -> None:
    """What cannot be captured is named; what is around a model as well."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))

    def both(model: nn.Module) -> None:
        split_layers(model, mesh["tp"])
        shard_blocks(model, mesh=mesh["dp"])

    cases = {
        "offload_policy": lambda model: shard_blocks(model, offload_policy=CPUOffloadPolicy(False)),
        "tensor parallelism": both,
    }
    for named, put in cases.items():
        model = net()
        put(model)
        with pytest.raises(fxcache.CaptureError, match=rf"blocks\.0.*{named}"):
            solve(fxcache.transform(model, NEVER, backend="eager"), net_at)
    model = net()
    shard_blocks(model)
    model.set_modules_to_forward_prefetch([model.blocks[0]])
    with pytest.raises(fxcache.CaptureError, match=r"set_modules_to_forward_prefetch\(\[\]\)"):
        solve(fxcache.transform(model, NEVER, backend="eager"), net_at)
    with pytest.raises(fxcache.FxCacheError, match="transform the Net"):
        fxcache.transform(nn.parallel.DistributedDataParallel(net()), NEVER)
    denoiser = fxcache.transform(net(), AdaptiveCache(tolerance=0.5), backend="eager")
    solve(nn.parallel.DistributedDataParallel(denoiser), net_at)
    assert denoiser.report().hits
