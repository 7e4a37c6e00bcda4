"""Training with a denoiser: gradients, moving averages, changes of mode, the example."""

import contextlib
import copy
import re
from itertools import product

import pytest
import scripts
import torch
from comparing import assert_close, assert_identical
from diffusers.training_utils import EMAModel
from helpers import hits, plain, sample, seeded, solve, times
from opened import Small, at
from PIL import Image
from policies import ALWAYS
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from zoo import make

import fxcache
from fxcache import StepSchedule


def gradients(model, loss, *inputs):
    """Of `loss`, with respect to all parameters and to `inputs`; they are cleared."""
    loss.backward()
    found = [p.grad for p in (*model.parameters(), *inputs)]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_gradients_are_the_models_own(autocast):
    """With checkpoints in the blocks, or around all; in training mode and in eval mode."""
    model, inputs = make("flux", num_layers=1)
    denoiser = plain(model)

    def loss_gradients(module, way):
        x = inputs["hidden_states"].clone().requires_grad_()

        def call(x):
            return module(**{**inputs, "hidden_states": x}).sample

        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            reentrant = {"use_reentrant": way == "whole, reentrant"}
            out = checkpoint(call, x, **reentrant) if way.startswith("whole") else call(x)
            loss = out.float().square().mean()
        return gradients(model, loss, x)

    for mode, way in product((True, False), ("plain", "whole", "whole, reentrant", "blocks")):
        model.train(mode)
        (model.enable_gradient_checkpointing if way == "blocks"
         else model.disable_gradient_checkpointing)()  # fmt: skip
        assert_identical(loss_gradients(denoiser, way), loss_gradients(model, way))
    assert hits(denoiser) == []


def test_changes_of_mode_meet_no_old_residual_and_recompile_little(denoiser):
    calls = iter(range(40))

    def run(*modes):
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            at(denoiser, next(calls))
        return hits(denoiser)[-1]

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    with denoiser.trajectory():
        assert [run() for _ in range(2)] == [False, True]
        assert [run(torch.inference_mode()), run()] == [True, True]  # the same function
        # Other kernels: no residual of the one serves the other.
        assert [run(autocast()) for _ in range(2)] == [False, True]
        assert [run() for _ in range(2)] == [False, True]
        for _ in range(3):
            denoiser.train()
            denoiser.eval()
            denoiser.requires_grad_(False)
            assert run()
            denoiser.requires_grad_(True)
            denoiser.to("cpu")
            assert run()
    # One each for inference_mode, autocast, and weights that need no gradients.
    assert denoiser.report().graphs == 4
    assert denoiser.report().recompiles == 3


def test_compiled_gradients_are_the_models_own(model):
    denoiser = fxcache.transform(model, ALWAYS, backend="aot_eager")
    solve(denoiser, 2)
    with torch.enable_grad():
        x, y = (sample(seed=3).requires_grad_() for _ in range(2))
        got = gradients(model, denoiser(x, times(0.2)).square().sum(), x)
        expected = gradients(model, model(y, times(0.2)).square().sum(), y)
    assert_close(got, expected)
    assert hits(denoiser) == [False, True]


def test_what_is_said_of_uncached_evaluations(denoiser, caplog):
    for _ in range(2):
        denoiser(sample().requires_grad_(), times(1.0))
        with torch.enable_grad():
            denoiser(sample(), times(1.0))
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert "x.detach()" in said[0]
    assert "gradients are enabled" in said[1]
    with torch.inference_mode():  # nothing of this can be recomputed
        denoiser(sample(), times(0.9))
    assert hits(denoiser) == [False]


UNCACHED = "after an uncached evaluation"


def test_steps_with_gradients_are_steps_of_the_trajectory(model):
    """Gradient guidance: of some steps a gradient is wanted, the others are cached."""
    policy = StepSchedule(mask=[False, False, True, False, True, True, True, True])
    denoiser, fresh = plain(model, policy), plain(model, policy)
    guided, outputs = (0, 3), []
    with denoiser.trajectory(num_steps=8):
        for i in range(8):
            with torch.set_grad_enabled(i in guided):
                outputs.append(at(denoiser, i))
    assert_identical([outputs[i] for i in guided], [at(model, i) for i in guided])
    shown = [(r.step, r.is_hit, r.reason) for r in denoiser.report().records]
    assert shown == [
        (1, False, "nothing cached"),
        (2, True, None),
        (4, False, UNCACHED),
        (5, True, None),
        (6, True, None),
        (7, True, None),
    ]
    # What follows is what follows where nothing else is known of the first steps.
    with fresh.trajectory(num_steps=8, first_step=4):
        assert_identical(outputs[4:], [at(fresh, i) for i in range(4, 8)])


def test_other_branches_keep_what_they_have(denoiser):
    with denoiser.trajectory():
        for i in range(3):
            with denoiser.branch("cond"), torch.set_grad_enabled(i == 1):
                at(denoiser, i)
            with denoiser.branch("uncond"):
                at(denoiser, i)
    shown = [(r.branch, r.step, r.is_hit) for r in denoiser.report().records]
    assert shown == [
        ("cond", 0, False), ("uncond", 0, False), ("uncond", 1, True),
        ("cond", 2, False), ("uncond", 2, True),
    ]  # fmt: skip


def test_training_evaluations_are_no_steps(denoiser):
    """Amid a preview, through the denoiser, in training mode or not; even without an update."""
    for announced, training in product((True, False), repeat=2):
        denoiser.reset()
        with denoiser.trajectory() if announced else contextlib.nullcontext():
            at(denoiser, 0)
            at(denoiser, 1)
            for noise in ([0.9, 0.2], [0.01, 0.3], [0.99, 0.99]):  # one goes back, as no step does
                with torch.enable_grad():
                    denoiser.train(training)
                    denoiser(sample(seed=5), torch.tensor(noise)).sum().backward()
                    denoiser.eval()
            at(denoiser, 2)
            at(denoiser, 3)
        shown = [(r.step, r.is_hit, r.reason) for r in denoiser.report().records]
        assert shown[2:] == [(2, False, UNCACHED), (3, True, None)], (announced, training)


class Checkpointed(Small):
    def stack(self, h):
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False)
        return h


def test_checkpointed_blocks_are_cached_without_gradients():
    """Nothing is saved there, so a checkpoint is what it wraps."""
    model = seeded(Checkpointed)
    denoiser = plain(model)
    assert_identical(at(denoiser, 0), at(model, 0))
    at(denoiser, 1)
    assert hits(denoiser) == [False, True]


def drift(model):
    """A training step, more or less."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.ones_like(parameter))


def test_a_copied_denoiser_is_one_of_its_own(model, denoiser):
    """``copy.deepcopy`` and torch's AveragedModel."""
    original = solve(denoiser)
    copied = copy.deepcopy(denoiser)
    assert copied.report().records == ()
    assert type(copied) is type(denoiser)
    assert copied.embed.weight is not denoiser.embed.weight
    averaged = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(2):
        drift(model)
        averaged.update_parameters(denoiser)
    average = seeded(Small)
    average.load_state_dict(averaged.module.state_dict())
    assert not torch.equal(average.embed.weight, model.embed.weight)
    assert_identical(solve(averaged), solve(plain(average)))
    assert_identical(solve(copied), original)
    assert hits(averaged.module) == hits(copied) == hits(denoiser) == [False, True, True, True]
    averaged.update_parameters(denoiser)
    averaged(sample(), times(0.1))
    assert averaged.module.report().records[-1].reason == "weights changed"


def test_averages_that_are_copied_in_and_out(model):
    """diffusers' EMAModel writes through ``.data``, which torch does not count: so one says so."""
    denoiser = plain(model)
    ema = EMAModel(denoiser.parameters(), decay=0.5)
    for _ in range(2):  # the first average is the model itself
        drift(model)
        ema.step(denoiser.parameters())
    before = solve(denoiser, 2)
    ema.store(denoiser.parameters())
    ema.copy_to(denoiser.parameters())
    denoiser.reset(records=False)
    with_average = [at(denoiser, i) for i in (24, 28)]  # lower timesteps: unannounced, the same
    ema.restore(denoiser.parameters())
    denoiser.reset(records=False)
    after = [at(denoiser, i) for i in (32, 36)]
    reasons = [record.reason for record in denoiser.report().records]
    assert reasons == ["nothing cached", None] * 3
    fresh = plain(model)
    assert_identical(after, [at(fresh, i) for i in (32, 36)])
    assert_identical(before, solve(fresh, 2))
    ema.copy_to(model.parameters())
    fresh.reset()
    assert_identical(with_average, [at(fresh, i) for i in (24, 28)])


def test_the_example_trains_and_previews(tmp_path, run_script):
    """A short run of examples/train_with_previews.py."""
    path = tmp_path / "previews.png"
    given = ["--steps", 40, "--every", 20, "--output", path]
    printed = run_script("train_with_previews", *given)
    example = scripts.load("train_with_previews")
    row = r"step +(\d+)  loss ([\d.]+)  preview: (\d+)/30 hits, ([\d.]+) dB"
    columns = zip(*re.findall(row, printed), strict=True)
    steps, losses, hit, decibels = (list(map(float, column)) for column in columns)
    assert steps == [20, 40]
    assert losses[-1] < 0.9 * losses[0]
    assert all(5 < count < 25 for count in hit)
    assert all(20 < value < 100 for value in decibels)
    assert "gradients through the denoiser are the model's own" in printed
    image = Image.open(path)
    assert image.size == (8 * 8 * example.SHOWN, 8 * 8 * len(steps))
    assert image.getextrema()[0] < 100 < 150 < image.getextrema()[1]
