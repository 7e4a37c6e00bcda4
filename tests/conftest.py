"""What every test shares: deterministic threads, no gradients, and a clean Dynamo."""

import os

# Compiling in this process keeps the two cores for the test itself and its warnings visible.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def clean_dynamo():
    """Every test starts without compiled code and samples without gradients."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
