"""What every test shares: deterministic threads, no gradients, and a clean Dynamo."""

import functools
import gc
import os

# Compiling in this process keeps the two cores for the test itself and its warnings visible.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from helpers import CountingDevice, plain, seeded
from opened import Small
from zoo import token_inputs

from fxcache.capture.compile import Compilers


def pytest_collection_finish():
    """Leave what was imported out of every garbage collection to come, of which there are few:
    tracing makes and drops so many objects that a fifth of the time went into looking at them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 1000)


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def clean_module():
    """No module is left the compiled code of another. Dynamo's guards look at the threads."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def clean_dynamo(request):
    """Every test starts without compiled code, unless its module has CAPTURES_ARE_SHARED, draws
    the same numbers whatever ran before it, and samples without gradients.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not hasattr(request.module, "CAPTURES_ARE_SHARED"):
        torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    """A denoiser of two blocks, which is captured in a moment."""
    return seeded(Small)


@pytest.fixture
def denoiser(model):
    """`model`, transformed: it hits whenever it may."""
    return plain(model)


@pytest.fixture
def inputs():
    """What `model` is called with."""
    return token_inputs()


@pytest.fixture
def run_script(monkeypatch, capsys):
    """What ``python examples/NAME.py ARGUMENTS`` prints, as a function of these."""
    import scripts

    return functools.partial(scripts.run, monkeypatch, capsys)


@pytest.fixture
def device(monkeypatch):
    """Stands in for the GPU of denoisers whose backend is a function."""
    device = CountingDevice()
    monkeypatch.setattr("fxcache.capture.rewrite.graph_device", lambda _: device)

    class WithGraphs(Compilers):
        def __init__(self, options):
            super().__init__(options)
            self.graphs = callable(options.backend)

    monkeypatch.setattr("fxcache.capture.runner.Compilers", WithGraphs)
    return device
