"""The server of examples/serve.py: what it prints, and that nothing is left of its requests."""

import asyncio
import functools
import gc

import diffusers
import pytest
import scripts
import torch
from helpers import assert_close, plain

from fxcache import AdaptiveCache

STEPS = 6
CAPTURES_ARE_SHARED = True


@pytest.fixture(scope="module")
def serving():
    return scripts.load("serve")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=3, num_layers=2, sample_size=4,
        patch_size=2, num_embeds_ada_norm=8, norm_type="ada_norm_zero",
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def captured(model):
    return plain(model, AdaptiveCache(tolerance=0.6), audit=False)


@pytest.fixture
def denoiser(captured):
    """What one capture serves all tests."""
    captured.reset()
    return captured


def served(serving, denoiser, clients, most=8):
    """What comes of `clients`, each a coroutine of a server."""

    async def run():
        server = serving.Server(denoiser, most, is_cached=True)
        loop = asyncio.create_task(server.run())
        results = await asyncio.gather(*(client(server) for client in clients))
        loop.cancel()
        return results

    return asyncio.run(run())


async def generate(server, seed, steps=STEPS):
    return await server.generate(seed % 8, seed, steps)


def test_pictures_are_those_of_requests_alone(serving, denoiser):
    clients = [functools.partial(generate, seed=seed) for seed in range(5)]
    together = served(serving, denoiser, clients, most=3)
    alone = [served(serving, denoiser, [client])[0] for client in clients]
    assert_close(together, alone)
    records = denoiser.report().records
    assert sum(record.is_hit for record in records) > 0
    assert len(records) == 2 * 5 * STEPS


def test_a_cancelled_request_leaves_nothing(serving, denoiser):
    async def impatient(server):
        task = asyncio.create_task(server.generate(3, 3, 1000))
        while not denoiser.report(1).records:
            await asyncio.sleep(0.01)
        task.cancel()

    others = [functools.partial(generate, seed=seed) for seed in range(3)]
    _, *pictures = served(serving, denoiser, [impatient, *others])
    assert len(pictures) == 3
    assert denoiser.report().cached_bytes == 0
    assert len(denoiser.report(1).records) < 1000


def test_memory_is_flat_over_a_thousand_requests(serving, denoiser):
    def tensors():
        gc.collect()
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    counts = []
    for _ in range(5):
        clients = [functools.partial(generate, seed=seed, steps=4) for seed in range(200)]
        served(serving, denoiser, clients, most=50)
        assert denoiser.report().cached_bytes == 0
        counts.append(tensors())
    assert max(counts[1:]) <= counts[0]
    assert len(denoiser.report().records) == 5 * 200 * 4


def test_an_error_is_that_of_whoever_waits(serving, denoiser):
    with pytest.raises(IndexError):
        served(serving, denoiser, [lambda server: server.generate(99, 0, STEPS)])
    assert denoiser.report().cached_bytes == 0


def test_the_script(serving, model, monkeypatch, run_script, tmp_path):
    """On a smaller model."""
    monkeypatch.setattr(serving, "load_denoiser", lambda: (model, ()))
    given = ["--requests", "3", "--rate", "50", "--most", "2", "--backend", "eager", "--steps", "8"]
    printed = run_script("serve", *given, "--output", tmp_path)
    rows = [line for line in printed.splitlines() if line.endswith(" dB")]
    assert [row.split("  ")[0] for row in rows] == [
        "plain, one by one", "plain, batched", "cached, one by one", "cached, batched",
    ]  # fmt: skip
    assert all(float(row.split()[-2]) > 40 for row in rows)
    assert (tmp_path / "served.png").stat().st_size > 10_000
