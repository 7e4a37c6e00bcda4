"""CUDA graphs: the runtime's logic, driven by a device that replays by running the work again.

A pointer that is no longer the right one, or an input that was not staged, shows as wrong numbers.
"""

import math
from contextlib import nullcontext

import pytest
import torch
from helpers import (
    ALTERNATE,
    MASK,
    NEVER,
    TAYLOR,
    CountingDevice,
    assert_close,
    assert_identical,
    graphed,
    hits,
    plain,
    sample,
    seeded,
    solve,
    times,
)
from opened import Small
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import fxcache
from fxcache import FirstBlockCache, StepSchedule, Taylor
from fxcache.capture.compile import Compilers
from fxcache.options import Options
from fxcache.runtime.device import CudaDevice, graph_device
from fxcache.runtime.graphs import MAX_QUIET_RESTARTS


@pytest.fixture
def model():
    return seeded(Small)


# --- the same numbers ---


@pytest.mark.parametrize(
    "policy",
    [
        NEVER,
        ALTERNATE,
        TAYLOR,
        FirstBlockCache(threshold=math.inf, max_consecutive_hits=2, tail_blocks=1),
        MASK,
        StepSchedule(mask=MASK.mask, forecast=Taylor(order=1)),
    ],
    ids=["never", "reuse", "taylor", "tail", "schedule", "schedule-taylor"],
)
def test_the_same_numbers_as_without_graphs(device, policy):
    """Announced or not."""
    model = seeded(lambda: Small(3))
    a, b = graphed(model, policy), plain(model, policy)
    for announced in (False, True):
        a.reset(), b.reset()
        for seed in (0, 1):
            with a.trajectory() if announced else nullcontext():
                got = solve(a, 8, seed)
            with b.trajectory() if announced else nullcontext():
                assert_close(got, solve(b, 8, seed))
        assert a.report().records == b.report().records
        assert device.counts()[0] > 0


@pytest.mark.slow
def test_inductor_pieces(model, monkeypatch):
    device = CountingDevice()
    monkeypatch.setattr("fxcache.capture.rewrite.graph_device", lambda _: device)
    a, b = fxcache.transform(model, ALTERNATE, mode="reduce-overhead"), plain(model, ALTERNATE)
    for seed in (0, 1):
        assert_close(solve(a, 6, seed), solve(b, 6, seed))
    assert device.captures == 3
    # Timesteps of diffusers are an expanded scalar, latents often a slice of a batch.
    for i in range(4):
        x, t = torch.randn(2, 8, 8)[..., ::2], torch.tensor([1 - i / 4]).expand(2)
        assert_close(a(x, t), b(x, t))
    assert device.captures == 6


def test_options_that_ask_for_graphs():
    for options in ({"mode": "reduce-overhead"}, {"mode": "max-autotune"},
                    {"options": {"triton.cudagraphs": True}}):  # fmt: skip
        assert Compilers(Options(**options)).graphs
    for mode in (None, "max-autotune-no-cudagraphs"):
        assert not Compilers(Options(mode=mode)).graphs
    assert graph_device(torch.device("cpu")) is None
    assert isinstance(graph_device(torch.device("cuda")), CudaDevice)


# --- what is captured, replayed and read ---


@pytest.mark.parametrize(
    ("policy", "pieces", "step"),
    [(ALTERNATE, 3, (0, 2, 1)), (TAYLOR, 5, (0, 2, 1)), (MASK, 2, (0, 1, 0))],
    ids=["reuse", "taylor", "schedule"],
)
def test_every_piece_is_captured_once(model, device, policy, pieces, step):
    """Head, hit, and a miss for each ring slot; then nothing is captured any more. A step is two
    replays and one read, or one replay if nothing is measured.
    """
    denoiser = graphed(model, policy)
    for _ in range(2):
        solve(denoiser, 8)
    assert device.counts()[0] == pieces
    for seed in range(3):
        solve(denoiser, 8, seed)
    device.reads = device.replays = 0
    with denoiser.trajectory():
        for i in range(8):
            denoiser(sample(), times(1 - i / 8))
            assert device.counts() == step
    assert policy is not MASK or hits(denoiser)[-8:] == list(MASK.mask)


# --- what callers hold ---


@pytest.mark.parametrize("policy", [ALTERNATE, MASK])
def test_outputs_are_not_written_again_and_inputs_never(model, device, policy):
    denoiser = graphed(model, policy)
    for seed in (0, 1):
        given = [(sample(seed=seed) + i, times(1 - i / 8)) for i in range(8)]
        before = [(x.clone(), t.clone()) for x, t in given]
        outputs, copies = [], []
        for x, t in given:
            outputs.append(denoiser(x, t))
            copies.append(outputs[-1].clone())
        assert_identical(outputs, copies)
        assert_identical(given, before)
        for output in outputs:
            output.mul_(math.nan)  # they are the caller's
    assert all(out.isfinite().all() for out in solve(denoiser, 8))


# --- layouts ---


@pytest.mark.parametrize("policy", [NEVER, MASK])
def test_slices_and_expanded_inputs_keep_their_strides(model, device, policy):
    strides = []

    def compiler(gm, example_inputs):
        def run(*args):
            strides.append([a.stride() for a in args if a.shape in ((2, 8, 4), (2,))])
            return gm(*args)

        return run

    a, b = fxcache.transform(model, policy, backend=compiler), plain(model, policy)
    for step in range(8):
        wide = torch.randn(2, 9, 8)
        x, t = wide[:, 1:, ::2], torch.tensor(1 - step / 8).expand(2)
        before = wide.clone()
        assert_close(a(x, t), b(x, t))
        assert torch.equal(wide, before)
    assert any((72, 8, 2) in given and (0,) in given for given in strides)
    assert not any((32, 4, 1) in given or (1,) in given for given in strides)


@pytest.mark.parametrize("dynamic", [None, True])
def test_new_shapes_capture_anew_and_old_ones_work_again(model, device, dynamic):
    a, b = (make(model, ALTERNATE, dynamic=dynamic) for make in (graphed, plain))
    for shape in ({}, {"batch": 3, "tokens": 5}, {}):
        device.counts()
        for seed in (0, 1):
            assert_close(solve(a, 6, seed, **shape), solve(b, 6, seed, **shape))
        assert device.counts()[0] == 3
    assert dynamic is None or a.report().graphs == 1


def test_a_number_that_changes_is_pointed_out(device, caplog):
    class Timed(Small):
        def forward(self, x, timestep):
            return super().forward(x, torch.full((x.shape[0],), 1.0) * timestep)

    model = seeded(Timed)
    denoiser = graphed(model, NEVER)
    for i in range(2 * MAX_QUIET_RESTARTS):
        x = sample(seed=i)
        assert_close(denoiser(x, 900 - i), model(x, 900 - i))
    assert caplog.text.count("captured anew") == 1
    assert "pass it as a tensor" in caplog.text


# --- weights ---


class LoRA(nn.Module):
    """What PEFT puts in the place of a layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.down = nn.Linear(self.in_features, 2, bias=False)
        self.up = nn.Linear(2, self.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def replace_parameter(model):
    model.blocks[1].proj.weight = nn.Parameter(torch.randn_like(model.blocks[1].proj.weight))


def swap_data(model):
    model.embed.weight.data = torch.randn_like(model.embed.weight)


def swap_in_place(model):
    model.blocks[1].up.weight.mul_(0.5)


def round_trip(model):
    model.to(torch.float64).to(torch.float32)


def load(model, **options):
    state = {name: value.clone() * 1.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state, **options)


def assign(model):
    load(model, assign=True)


def adapt(model):
    model.blocks[1].proj = LoRA(model.blocks[1].proj)


CHANGES = [replace_parameter, swap_data, swap_in_place, round_trip, load, assign, adapt]


@pytest.mark.parametrize("policy", [NEVER, StepSchedule(mask=[False])], ids=["head", "none"])
def test_changed_weights_are_used_at_once(model, device, policy):
    denoiser = graphed(model, policy)
    for change in CHANGES:
        with denoiser.trajectory():
            for i in range(9):
                if i in (4, 7):
                    change(model)
                x, t = sample(seed=i), times(1 - i / 9)
                assert_close(denoiser(x, t), model(x, t))
            replayed = device.replays
            denoiser(sample(), times(0))
            denoiser(sample(), times(0))
        assert device.replays > replayed, change


def test_replaced_weights_inside_of_a_subclass_are_seen(device):
    """Quantized weights are tensors around others, and have no address of their own."""

    def wrapped(value):
        return nn.Parameter(TwoTensor(value.clone(), value.clone()), requires_grad=False)

    model = seeded(Small)
    model.out.weight = wrapped(model.out.weight.data)
    denoiser = graphed(model, NEVER)
    for i in range(6):
        if i == 4:
            model.out.weight = wrapped(model.out.weight.a * 2)
        assert_close(denoiser(sample(), times(1)).a, model(sample(), times(1)).a)
