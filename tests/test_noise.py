"""The sampler's fresh noise: told from what the model and the sampler make, and only once."""

import inspect
import math
import re

import pytest
import torch
from helpers import plain, sample, seeded, times
from torch import nn
from zoo import Block, SequentialDiT

from fxcache import FirstBlockCache, MagCache
from fxcache.runtime import noise
from fxcache.runtime.noise import IN_A_ROW, SAMPLED, unexplained

diffusers = pytest.importorskip("diffusers")

TIGHT = FirstBlockCache(threshold=1e-7)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}

DETERMINISTIC = {
    "EulerDiscrete": {},
    "HeunDiscrete": {},
    "DPMSolverMultistep": {},
    "UniPCMultistep": {"solver_order": 3},
    "DEISMultistep": {"solver_order": 3},
    "UniPCMultistep, flow": FLOW,
    "DDIM": {"clip_sample": False},
    "PNDM": {"skip_prk_steps": True},
    "LMSDiscrete": {},
    "FlowMatchEulerDiscrete": {"shift": 3.0},
    "FlowMatchHeunDiscrete": {},
}
STOCHASTIC = {
    "EulerAncestralDiscrete": {},
    "DDPM": {"clip_sample": False},
    "LCM": {},
    "DPMSolverMultistep": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSDE": {},
    "KDPM2AncestralDiscrete": {},
    "FlowMatchEulerDiscrete": {"stochastic_sampling": True},
    "DDIM": {"clip_sample": False, "eta": 1.0},
}


class Timed(SequentialDiT):
    """Timesteps from 1000 to 0; predicts about the noise that is in its input, and is so curved
    that multistep solvers are far from straight lines.
    """

    def forward(self, x, timestep, text=None):
        h = self.embed(3 * x) + self.time(timestep[:, None] / 1000)[:, None]
        h = h if text is None else h + text
        return x + self.out(self.norm(self.stack(h)))


@pytest.fixture
def model():
    return seeded(Timed)


def solve(denoiser, name="EulerDiscrete", steps=14, guidance=None, tokens=64, **config):
    """Sample with diffusers' scheduler `name`. Guidance is in two "branches", or in one "batch"."""
    eta = config.pop("eta", None)
    scheduler = getattr(diffusers, f"{name.split(',')[0]}Scheduler")(**config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 4, generator=generator)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    more = {} if eta is None else {"eta": eta}
    if "generator" in inspect.signature(scheduler.step).parameters:
        more["generator"] = generator
    with denoiser.trajectory():
        for t in scheduler.timesteps:
            given = x
            if hasattr(scheduler, "scale_model_input"):
                given = scheduler.scale_model_input(x, t)
            x = scheduler.step(guided(denoiser, given, t, guidance), t, x, **more).prev_sample
    return x


TEXTS = 2 * torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(2))


def guided(denoiser, x, t, guidance):
    if guidance is None:
        return denoiser(x, times(t))
    if guidance == "batch":
        both = denoiser(torch.cat([x, x]), times(t, 4), TEXTS.repeat_interleave(2, dim=0))
        cond, uncond = both.chunk(2)
    else:
        with denoiser.branch("cond"):
            cond = denoiser(x, times(t), TEXTS[:1])
        with denoiser.branch("uncond"):
            uncond = denoiser(x, times(t), TEXTS[1:])
    return uncond + 4 * (cond - uncond)


def findings(caplog):
    return [record.message for record in caplog.records if "fresh noise" in record.message]


def begin_anew(denoiser):
    """As if nothing had been said or examined."""
    denoiser.reset()
    denoiser._fxcache.session._warned.clear()
    denoiser._fxcache.session._is_examined = False


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers and numpy
@pytest.mark.parametrize("guidance", [None, "branches", "batch"])
def test_samplers_are_told_apart(model, caplog, guidance):
    denoiser = plain(model, TIGHT)
    for is_fresh, samplers in ((False, DETERMINISTIC), (True, STOCHASTIC)):
        for name, config in samplers.items():
            if name == "DPMSolverSDE" and not diffusers.utils.is_torchsde_available():
                continue
            caplog.clear()
            begin_anew(denoiser)
            solve(denoiser, name, guidance=guidance, **config)
            assert not denoiser.report().hits
            assert len(findings(caplog)) == is_fresh, (name, config)


def test_the_message(model, caplog):
    """It follows the one that says that nothing hit, has the share and the step, and comes once."""
    denoiser = plain(model, TIGHT)
    for _ in range(2):
        solve(denoiser, "EulerAncestralDiscrete")
    never, found = [r.message for r in caplog.records if r.name == "fxcache"]
    assert "FirstBlockCache(threshold=1e-07) never hit" in never
    assert found.startswith("FirstBlockCache does not hit: the sampler seems to add fresh noise")
    assert re.search(r"at step 7, (\d+)% does not follow", found)
    assert all(word in found for word in ("eta=0", "ancestral", "MagCache", "StepSchedule"))


def test_a_second_trajectory_may_be_the_first_to_be_long_enough(model, caplog):
    denoiser = plain(model, TIGHT)
    solve(denoiser, "EulerAncestralDiscrete", steps=5)
    assert not findings(caplog)
    solve(denoiser, "EulerAncestralDiscrete", steps=10)
    assert len(findings(caplog)) == 1


# --- what it costs ---


@pytest.fixture
def judged(monkeypatch):
    """A list that grows with each read-back."""
    seen = []

    def counted(*given):
        seen.append(unexplained(*given))
        return seen[-1]

    monkeypatch.setattr(noise, "unexplained", counted)
    return seen


def test_it_is_looked_for_once_and_only_where_nothing_hits(model, judged, monkeypatch):
    for policy in (
        FirstBlockCache(threshold=1.0),
        FirstBlockCache(threshold=1e-7, warmup_steps=20),
        MagCache(ratios=[1.0, *[9.0] * 13], threshold=1e-3, retention_ratio=0),
    ):
        solve(plain(model, policy), "EulerAncestralDiscrete")
    assert not judged
    denoiser = plain(model, TIGHT)
    for _ in range(3):
        solve(denoiser, "EulerDiscrete")
    assert len(judged) == IN_A_ROW
    assert max(judged) < 1e-4
    other = plain(model, TIGHT)
    for _ in range(3):
        solve(other, "EulerAncestralDiscrete")
    assert len(judged) == IN_A_ROW + 2
    assert all(share > 0.05 for share in judged[IN_A_ROW:])
    begin_anew(other)
    other._fxcache.session.observe = lambda *given: None  # somebody who records, and wants no hit
    solve(other, "EulerAncestralDiscrete")
    assert len(judged) == IN_A_ROW + 2


def test_nothing_is_kept_once_it_is_over(model):
    denoiser = plain(model, TIGHT)
    with denoiser.trajectory():
        for i in range(12):
            denoiser(sample(tokens=64, seed=i), times(1000 - 50 * i))
            (slot,) = denoiser._fxcache.session.slots.values()
            kept = slot.exam is not None and len(slot.exam._seen) > 0
            assert kept == (5 <= i < 7)
        assert slot.exam.share > 0.5
    assert slot.exam is None


# --- inputs and outputs of other kinds ---


class Maps(nn.Module):
    """Takes and predicts feature maps, of more channels (an image, a mask) or fewer."""

    def __init__(self, given, predicted):
        super().__init__()
        self.given, self.predicted = nn.Linear(given, 16), nn.Linear(16, predicted)
        self.blocks = nn.Sequential(*(Block(16) for _ in range(3)))

    def forward(self, x, timestep):
        h = self.given(x.flatten(2).mT) * (1 + timestep[:, None, None] / 1000)
        return self.predicted(self.blocks(h)).mT.unflatten(2, x.shape[2:])


def euler(denoiser, x, step, noise_of_a_step, beside=None, axis=1, batch=1):
    """Sampling by hand: each step follows the model's first four channels, and adds noise."""
    generator = torch.Generator().manual_seed(1)
    with denoiser.trajectory():
        for i in range(10):
            given = x if beside is None else torch.cat([x, beside], dim=axis)
            given = torch.cat([given] * batch)
            out = denoiser(given, times(1000 - 90 * i, len(given)))
            out = out.narrow(axis, 0, x.shape[axis]).unflatten(0, (batch, -1)).mean(0)
            fresh = torch.randn(x.shape, generator=generator)
            x = x + step * out + noise_of_a_step * fresh


@pytest.mark.parametrize(
    "kind", ["image beside", "variance", "tokens behind", "guided tokens behind", "batch of three"]
)
def test_what_is_no_sample_does_not_count(caplog, kind):
    """Channels and tokens that stay what they are explain nothing, and need no explanation."""
    torch.manual_seed(0)
    maps, tokens = torch.randn(1, 4, 12, 12), torch.randn(1, 64, 4)
    model, x, beside, axis, batch = {
        "image beside": (Maps(9, 4), maps, torch.randn(1, 5, 12, 12), 1, 2),
        "variance": (Maps(4, 8), maps, None, 1, 1),
        "tokens behind": (Timed(), tokens, 9 * torch.randn(1, 64, 4), 1, 1),
        "guided tokens behind": (Timed(), tokens, 9 * torch.randn(1, 64, 4), 1, 2),
        "batch of three": (Maps(4, 4), maps, None, 1, 3),
    }[kind]
    denoiser = plain(model.eval(), TIGHT)
    for spread in (0.0, 0.5):
        begin_anew(denoiser)
        euler(denoiser, x, 0.1, spread, beside, axis, batch)
        assert len(findings(caplog)) == (spread > 0)


@pytest.mark.parametrize("given", [{"tokens": 5}, {"batch": 1, "tokens": 3}])
def test_too_few_elements_say_nothing(model, caplog, judged, given):
    denoiser = plain(model, TIGHT)
    with denoiser.trajectory():
        for i in range(12):
            denoiser(sample(seed=i, **given), times(1000 - 50 * i, given.get("batch", 2)))
    assert judged[-1] is None
    assert not findings(caplog)


def test_an_output_of_another_kind_says_nothing(caplog, judged):
    class Pooled(Timed):
        def forward(self, x, timestep):
            return super().forward(x, timestep).mean(1)

    denoiser = plain(seeded(Pooled), TIGHT)
    with denoiser.trajectory():
        for i in range(12):
            denoiser(sample(seed=i, tokens=64), times(1000 - 50 * i))
    assert not judged
    assert not findings(caplog)


def test_a_model_in_pieces_is_not_examined(caplog, judged):
    """What the graph with the stack is given is not the sampler's."""

    class Broken(Timed):
        def forward(self, x, timestep):
            x = x.sin()
            torch._dynamo.graph_break()
            return super().forward(x, timestep)

    denoiser = plain(seeded(Broken), TIGHT, fullgraph=False)
    solve(denoiser, "EulerAncestralDiscrete")
    assert len(denoiser.report().records) == 14
    assert not judged


# --- the regression ---


def vectors(number, size=4000, seed=0):
    return list(torch.randn(number, size, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 1.0])
def test_the_share_is_what_was_added(share):
    x, a, b, fresh = vectors(4)
    followed = 0.6 * x - 1.5 * a + 0.2 * b
    followed, fresh = (v / v.norm() for v in (followed, fresh))
    now = (1 - share) ** 0.5 * followed + share**0.5 * fresh
    found = unexplained(now, [x, a, b, x, a + 1e-4 * b], x)
    assert found == pytest.approx(share, rel=0.05, abs=1e-6)


def test_elements_that_stay_are_left_out():
    x, a = vectors(2)
    now = x + a
    now[1000:] = x[1000:] = 50.0
    assert unexplained(now, [x, a], x) == pytest.approx(0, abs=1e-6)
    assert unexplained(x, [x, a], x) is None


def test_zeros_and_what_is_not_finite():
    x, a = vectors(2)
    assert unexplained(x + a, [x, torch.zeros(4000), a], x) == pytest.approx(0, abs=1e-6)
    assert unexplained(x + a, [torch.zeros(4000)], x) == pytest.approx(1)
    for bad in (math.nan, math.inf):
        broken = a.clone()
        broken[7] = bad
        share = unexplained(x + a, [x, broken], x)
        assert share is None


@pytest.mark.parametrize(
    ("batch", "rows"),
    [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (6, [0, 1, 2, 3, 4]), (64, [0, 1, 2, 3, 16, 32, 48])],
)
def test_where_other_branches_may_stand_in_a_batch(batch, rows):
    """Beside the first sample, or a half, a third, a quarter of the batch behind it."""
    exam = noise.Exam(None, 0)
    x = torch.arange(batch)[:, None].expand(batch, 5).float()
    exam.look(None, 1, x, [x])
    assert [int(row[0]) for row in exam._seen[-1]] == [0, *rows]


def test_large_samples_are_drawn_from():
    exam = noise.Exam(None, 3)
    x, out = torch.randn(2, 1, 4, SAMPLED)
    exam.look(None, 4, x, [out])
    assert [len(row) for row in exam._seen[-1]] == [SAMPLED] * 2
