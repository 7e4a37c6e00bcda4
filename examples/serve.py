"""Serve a denoiser: requests arrive when they like, are batched, and each decides by itself.

    python examples/serve.py --requests 48 --output served

An asyncio queue with continuous batching: at every step, whoever is there is evaluated in one call,
at a timestep of its own; requests join and leave between steps. The same arrivals (a Poisson
process) are served four ways, with the cache and without, batched and one by one. Written down are
requests a second, waiting times, and how far the pictures are from the plain model's (PSNR): a
table, and a figure of when requests were done.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fxcache
from fxcache.demo.metrics import psnr
from fxcache.demo.sampler import GUIDANCE, load_denoiser


@dataclass(eq=False)
class Request:
    """One picture that somebody waits for: its noise, where it is, and what it holds open."""

    name: int
    label: int
    x: torch.Tensor
    steps: int
    done: "asyncio.Future[torch.Tensor]"
    step: int = 0
    opened: ExitStack = field(default_factory=ExitStack)

    def times(self) -> tuple[float, float]:
        """Now, and after this step: from 1 to 0."""
        return 1 - self.step / self.steps, 1 - (self.step + 1) / self.steps


class Server:
    """Evaluates up to `most` requests at once with `denoiser`, a class-conditional model that
    `is_cached` or plain.
    """

    def __init__(self, denoiser: Any, most: int, *, is_cached: bool) -> None:
        self.denoiser, self.most, self.is_cached = denoiser, most, is_cached
        self.waiting: list[Request] = []
        self.live: list[Request] = []
        self.arrived = asyncio.Event()
        self.names = 0

    async def generate(self, label: int, seed: int, steps: int) -> torch.Tensor:
        """The picture of a class: float32 [channels, side, side]. Whoever cancels this takes the
        request back.
        """
        config = self.denoiser.config
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        future = asyncio.get_running_loop().create_future()
        self.names += 1
        self.waiting.append(Request(self.names, label, noise, steps, future))
        self.arrived.set()
        return await future

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            while True:
                await self.arrived.wait()
                self._admit()
                if self.live:
                    await self._serve_step()
                if not self.live and not self.waiting:
                    self.arrived.clear()
        finally:
            for request in self.live:
                request.opened.close()

    async def _serve_step(self) -> None:
        """One step of all that are there, in a thread, so that others can arrive meanwhile."""
        together = list(self.live)
        try:
            await asyncio.to_thread(self._step, together)
        except Exception as error:  # noqa: BLE001 - is that of whoever waits
            for request in together:
                if not request.done.done():
                    request.done.set_exception(error)

    def _admit(self) -> None:
        """Let go who is done or cancelled, and let in who waits."""
        for request in [r for r in self.live if r.done.done() or r.step == r.steps]:
            self.live.remove(request)
            request.opened.close()  # what the cache holds of it is free
            if not request.done.done():
                request.done.set_result(request.x[0])
        while self.waiting and len(self.live) < self.most:
            request = self.waiting.pop(0)
            if self.is_cached:
                solve = self.denoiser.trajectory(num_steps=request.steps, slot=request.name)
                request.opened.enter_context(solve)
            self.live.append(request)

    @torch.inference_mode()
    def _step(self, requests: Sequence[Request]) -> None:
        """One step of each, in one call: a request is two rows, with its class and without."""
        none = self.denoiser.config.num_embeds_ada_norm
        labels = torch.tensor([each for r in requests for each in (r.label, none)])
        times = torch.tensor([1000 * r.times()[0] for r in requests]).repeat_interleave(2)
        x = torch.cat([r.x for r in requests]).repeat_interleave(2, 0)
        with ExitStack() as stack:
            if self.is_cached:
                names = [r.name for r in requests]
                stack.enter_context(self.denoiser.batch(names, rows_per_request=2))
            velocity = self.denoiser(x, timestep=times, class_labels=labels).sample
        for request, (cond, uncond) in zip(requests, velocity.unflatten(0, (-1, 2)), strict=True):
            now, after = request.times()
            guided = uncond + GUIDANCE * (cond - uncond)
            request.x = request.x + (after - now) * guided
            request.step += 1


@dataclass
class Served:
    """What came of one way to serve: seconds from arrival to picture, when each was done, and the
    pictures.
    """

    waits: list[float]
    done: list[float]
    pictures: torch.Tensor
    hits: float

    @property
    def rate(self) -> float:
        return len(self.done) / max(self.done)


async def serve(server: Server, arrivals: Sequence[float], steps: int) -> Served:
    """Let requests arrive at these seconds."""
    loop = asyncio.create_task(server.run())
    start, waits, done = time.perf_counter(), {}, {}
    classes = server.denoiser.config.num_embeds_ada_norm

    async def client(number: int) -> torch.Tensor:
        await asyncio.sleep(arrivals[number])
        began = time.perf_counter()
        picture = await server.generate(number % classes, number, steps)
        done[number] = time.perf_counter() - start
        waits[number] = time.perf_counter() - began
        return picture

    pictures = await asyncio.gather(*map(client, range(len(arrivals))))
    loop.cancel()
    records = server.denoiser.report().records if server.is_cached else ()
    hits = sum(record.is_hit for record in records) / max(len(records), 1)
    shown = (torch.stack(pictures).clamp(-1, 1) + 1) / 2
    return Served(list(waits.values()), list(done.values()), shown, hits)


def poisson(number: int, rate: float) -> list[float]:
    """When requests arrive, in seconds: `rate` a second in the mean."""
    generator = torch.Generator().manual_seed(0)
    gaps = torch.empty(number).exponential_(rate, generator=generator)
    return gaps.cumsum(0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rate", type=float, default=20.0, help="arrivals a second")
    parser.add_argument("--most", type=int, default=8, help="requests in one call")
    parser.add_argument("--tolerance", type=float, default=0.08)
    parser.add_argument("--backend", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--output", default="served", help="folder for the figure")
    args = parser.parse_args()
    model, _ = load_denoiser()
    arrivals = poisson(args.requests, args.rate)

    def cached() -> Any:
        policy = fxcache.AdaptiveCache(tolerance=args.tolerance)
        return fxcache.transform(model, policy, backend=args.backend)

    def plain() -> Any:
        if args.backend == "eager":
            return model
        torch._dynamo.reset()
        return torch.compile(model, dynamic=True)

    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "plain, one by one": (plain, 1),
        "plain, batched": (plain, args.most),
        "cached, one by one": (cached, 1),
        "cached, batched": (cached, args.most),
    }
    results: dict[str, Served] = {}
    for way, (make, most) in ways.items():
        denoiser = make()
        is_cached = "cached" in way
        for number in (1, 2 * most):  # compiles, for one request and for several
            first = Server(denoiser, most, is_cached=is_cached)
            asyncio.run(serve(first, [0.0] * number, steps=4))
        if is_cached:
            denoiser.reset()
        server = Server(denoiser, most, is_cached=is_cached)
        results[way] = asyncio.run(serve(server, arrivals, args.steps))
        print(f"served {args.requests} requests: {way}", flush=True)
    table(results)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    figure(results, arrivals, folder / "served.png")
    print(f"wrote {folder / 'served.png'}")


def table(results: dict[str, Served]) -> None:
    base = results["plain, one by one"]
    print(
        f"{'':20s} {'requests/s':>10s} {'wait, median':>13s} {'90 %':>8s} {'hits':>6s} {'PSNR':>9s}"
    )
    for way, served in results.items():
        waits = sorted(served.waits)
        near = psnr(served.pictures, base.pictures) if served is not base else float("inf")
        late = waits[int(0.9 * (len(waits) - 1))]
        print(
            f"{way:20s} {served.rate:10.2f} {statistics.median(waits):11.2f} s {late:6.2f} s "
            f"{served.hits:6.0%} {near:6.1f} dB"
        )


def figure(results: dict[str, Served], arrivals: Sequence[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown, axes = pyplot.subplots(figsize=(7, 4))
    number = range(1, len(arrivals) + 1)
    axes.step(arrivals, number, color="black", linestyle=":", label="arrived")
    for way, served in results.items():
        axes.step(sorted(served.done), number, label=f"done: {way}")
    axes.set(xlabel="seconds", ylabel="requests", title="The same arrivals, served four ways")
    axes.legend()
    shown.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
