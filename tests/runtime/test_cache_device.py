"""`cache_device`: residuals in host memory, fetched for hits and put back after misses.

Most of it is told by the CPU, which stands in for a GPU; what only a GPU can tell is below.
"""

import copy
import json

import pytest
import torch
from comparing import assert_identical
from helpers import hits, plain, sample, seeded, solve, times
from opened import opened
from policies import ALTERNATE, EASY, EVERY, FORECAST, MASK, NEVER, SCHEDULE, name_of
from zoo import SequentialDiT

import fxcache
from fxcache.capture.compile import Compilers
from fxcache.errors import OptionError
from fxcache.options import Options
from fxcache.report import Report
from fxcache.runtime.host import HostedRegions
from fxcache.runtime.state import Buffers
from fxcache.tuning.record import Recorder

HOST = {"cache_device": "cpu"}
E4M3 = torch.float8_e4m3fn


@pytest.fixture
def away(monkeypatch):
    """The CPU stands in for a GPU: residuals are taken for being kept elsewhere. Grows with each
    evaluation that is done so.
    """
    calls, begin = [], HostedRegions.begin
    monkeypatch.setattr(HostedRegions, "begin", lambda *given: calls.append(1) or begin(*given))
    monkeypatch.setattr("fxcache.capture.rewrite.is_away", lambda host, device: bool(host))
    return calls


class Wiring:
    """Stands in for compiled pieces: notes what hits are given, and stores numbers on misses."""

    ring, others = 3, 0

    def __init__(self):
        self.given = []

    def head(self, inputs, own):
        return (inputs[0] + 1,), torch.tensor([0.25])

    def hit(self, values, own, weights):
        self.given.append((values, own, weights))
        return ["output"]

    def miss(self, values, own, slot, weights):
        if weights is not None:
            self.given.append((values, own, weights))
        for number, ring in enumerate(own.rings):
            ring[slot].fill_(10 + number)
        return ["output"], None


def host_rings():
    """Two streams, three residuals each, all different."""
    return tuple(
        tuple(torch.full((2, 3 + stream), 3.0 * stream + at) for at in range(3))
        for stream in range(2)
    )


@pytest.mark.parametrize("weights", [[0.0, 2.0, -1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
def test_a_hit_is_given_copies_of_what_it_uses(weights):
    own, wiring = Buffers({"kept": torch.ones(2)}, host_rings()), Wiring()
    evaluation = HostedRegions(wiring, torch.device("cpu")).begin((torch.ones(1),), own)
    assert evaluation.read() == [0.25]
    assert evaluation.hit(weights) == ["output"]
    ((values, given, vector),) = wiring.given
    assert given.kept is own.kept
    assert (values, vector.tolist()) == ((1.0, 2.0), weights)
    held = {residual.data_ptr() for ring in own.rings for residual in ring}
    for near, far in zip(given.rings, own.rings, strict=True):
        assert held.isdisjoint(residual.data_ptr() for residual in near)
        used = [at for at, weight in enumerate(weights) if weight]
        assert all(torch.equal(near[at], far[at]) for at in used)
        assert len({residual.data_ptr() for residual in near}) == max(len(used), 1)


def test_a_miss_writes_one_slot_of_each_ring_and_nothing_else():
    own, wiring = Buffers({}, host_rings()), Wiring()
    evaluation = HostedRegions(wiring, torch.device("cpu")).begin((torch.ones(1),), own)
    assert evaluation.miss(1) == (["output"], None)
    values = [[float(residual.mean()) for residual in ring] for ring in own.rings]
    assert values == [[0.0, 10.0, 2.0], [3.0, 11.0, 5.0]]


def test_a_miss_is_given_copies_of_what_it_is_compared_with():
    own, wiring = Buffers({}, host_rings()), Wiring()
    wiring.others = 2
    HostedRegions(wiring, torch.device("cpu")).begin((torch.ones(1),), own).miss(1, [0.0, 2.0])
    ((_, given, vector),) = wiring.given
    assert vector.tolist() == [0.0, 2.0]
    for near, far in zip(given.rings, own.rings, strict=True):
        assert torch.equal(near[2], far[2])
        assert near[2].data_ptr() != far[2].data_ptr()
    assert [float(ring[1].mean()) for ring in own.rings] == [10.0, 11.0]


def test_pieces_run_where_the_model_is():
    """Rings on the host, pieces on another device: all that a hit is given lies there."""
    own, wiring = Buffers({}, host_rings()), Wiring()
    evaluation = HostedRegions(wiring, torch.device("meta")).begin((torch.ones(1),), own)
    evaluation.hit([1.0, 0.0, 1.0])
    ((_, given, vector),) = wiring.given
    assert {residual.device.type for ring in given.rings for residual in ring} == {"meta"}
    assert given.device.type == vector.device.type == "meta"
    assert own.device.type == "cpu"


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (SCHEDULE, {}),
        (EASY, {}),
        (FORECAST, {"guards": "trajectory", "kernel": "triton", "cache_dtype": E4M3}),
    ],
    ids=name_of,
)
def test_the_host_path_computes_the_same(model, away, policy, options):
    """And misses between hits are exact, whatever is kept, and wherever."""
    dtype = {"cache_dtype": options.get("cache_dtype")}
    hosted, without = plain(model, policy, **options, **HOST), plain(model, policy, **dtype)
    outputs = solve(hosted, 8)
    assert_identical(outputs, solve(without, 8))
    assert hosted.report() == without.report()
    assert len(away) == 8
    for step, (output, is_hit) in enumerate(zip(outputs, hits(hosted), strict=True)):
        if not is_hit:
            assert_identical(output, model(sample() + 0.05 * step, times(1 - step / 8)))
    assert any(hits(hosted))


def test_where_the_model_is_on_the_host_nothing_is_hosted(model, monkeypatch):
    monkeypatch.setattr(HostedRegions, "begin", None)
    denoiser = plain(model, ALTERNATE, **HOST)
    solve(denoiser)
    assert any(hits(denoiser))


def test_bytes_are_told_by_device(denoiser):
    solve(denoiser)
    report = denoiser.report()
    assert report.cached_by_device == {"cpu": report.cached_bytes}
    assert json.loads(json.dumps(report.to_dict()))["cached_by_device"] == report.cached_by_device
    assert "MiB cached, " in str(report)
    mixed = {"cuda:0": 2**20, "cpu": 2**21}
    two = Report((), 3 * 2**20, 1, 0, mixed)
    assert "3.00 MiB cached (1.00 MiB on cuda:0, 2.00 MiB on cpu), 1 graph(s)" in str(two)
    both = Report.merged({"a": report, "b": two})
    assert both.cached_by_device == {**mixed, "cpu": 2**21 + report.cached_bytes}
    assert both.cached_bytes == sum(both.cached_by_device.values())


def test_the_host_by_any_spelling_and_nothing_else(model):
    for device in ("cpu", "cpu:0", torch.device("cpu"), None):
        options = Options(cache_device=device)
        assert options.host == (None if device is None else torch.device(device))
    for device in ("cuda", "meta", "disk", "", 0, torch.device("cuda:1"), True):
        with pytest.raises(OptionError, match=r'cache_device must be "cpu".*got'):
            fxcache.transform(model, cache_device=device)
    for options in ({"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}):
        with pytest.raises(OptionError, match=r"cache_device='cpu' cannot be had with CUDA graphs"):
            fxcache.transform(model, cache_device="cpu", **options)
        assert Compilers(Options(cache_dtype=torch.bfloat16, **options)).graphs


def test_options_survive_copies(model, away):
    denoiser = plain(model, MASK, cache_dtype=E4M3, **HOST)
    again = copy.deepcopy(denoiser)
    solve(again)
    assert len(away) == 4
    assert again.report().cached_bytes == 2 * 8 * 16 * E4M3.itemsize


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{"backend": "eager"}, {}])
@pytest.mark.parametrize("policy", EVERY, ids=name_of)
def test_residuals_of_a_gpu_in_pinned_memory(policy, options):
    model = seeded(SequentialDiT).cuda()
    hosted, without = (opened(model, policy, **{"backend": "inductor", **options, **where})
                       for where in (HOST, {}))  # fmt: skip
    outputs = []
    for denoiser in (hosted, without):
        inputs = [(sample() + 0.05 * i, times(1 - i / 8)) for i in range(8)]
        outputs.append([denoiser(x.cuda(), t.cuda()) for x, t in inputs])
    assert_identical(*outputs)
    assert all(residual.is_pinned() for residual in hosted.residuals())
    report = hosted.report()
    assert report.records == without.report().records
    assert report.cached_bytes == without.report().cached_bytes
    residuals = sum(residual.nbytes for residual in hosted.residuals())
    assert report.cached_by_device["cpu"] == residuals


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorder_sees_residuals_that_have_arrived():
    """Copies to the host are not waited for, except by who reads them there."""
    model = seeded(lambda: SequentialDiT(width=512)).cuda()
    recorded = []
    for options in (HOST, {}):
        denoiser = opened(model, NEVER, **options)
        recorder = denoiser.session.observe = Recorder()
        for i in range(4):
            denoiser(sample(8, 512).cuda(), times(1 - i / 4, 8).cuda())
        (trajectory,) = recorder.trajectories.values()
        recorded.append(trajectory.residuals)
    assert_identical(*recorded)
