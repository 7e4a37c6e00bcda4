"""What the pass finds in small architectures, by what flows in them and not by their names."""

from collections import OrderedDict

import pytest
import torch
from captured import captured
from comparing import assert_identical
from helpers import plain, seeded
from nets import WIDTH, Branch, Net, Residual, check, tokens
from opened import Small
from policies import ALWAYS, NEVER
from torch import nn
from zoo import token_inputs

import fxcache
from fxcache import StackNotFoundError, StepSchedule
from fxcache.pipelines.tiny import tiny_model


class Numbered(Net):
    """The blocks are attributes: block_0, block_1, ..."""

    def hold(self, blocks):
        for number, block in enumerate(blocks):
            self.add_module(f"block_{number}", block)

    def each(self):
        return [module for name, module in self.named_children() if name.startswith("block_")]


class InDict(Net):
    def hold(self, blocks):
        self.enc = nn.ModuleDict({f"8x8_block{k}": block for k, block in enumerate(blocks)})

    def each(self):
        return self.enc.values()


class Named(Net):
    """A Sequential of an OrderedDict."""

    def hold(self, blocks):
        self.layers = nn.Sequential(OrderedDict((f"layer_{k}", b) for k, b in enumerate(blocks)))

    def each(self):
        return self.layers


class ListOfLists(Net):
    """Attention and feed forward of a layer, in a list of lists; the parent adds."""

    def hold(self, blocks):
        self.layers = nn.ModuleList(nn.ModuleList([Branch(), Branch()]) for _ in blocks)

    def stack(self, h, t):
        for first, second in self.layers:
            h = first(h, t) + h
            h = second(h, t) + h
        return h


class Outside(Net):
    """The addition is the parent's."""

    make = Branch

    def stack(self, h, t):
        for block in self.blocks:
            h = h + block(h, t)
        return h


class Shared(Net):
    """One block, called again and again."""

    def hold(self, blocks):
        self.block = blocks[0]

    def each(self):
        return [self.block] * 3


class Functional(nn.Module):
    """No modules at all."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) / 8 for _ in range(6))
        self.ends = nn.ParameterList([torch.randn(8, WIDTH) / 3, torch.randn(WIDTH, 8) / 6])

    def forward(self, x, t):
        h = x @ self.ends[0]
        for up, down in zip(self.weights[::2], self.weights[1::2], strict=True):
            h = h + torch.tanh((h * t[:, None, None]) @ up) @ down
        return h @ self.ends[1]


class InPlace(Net):
    def stack(self, h, t):
        for block in self.blocks:
            h += block(h, t) - h
        return h


class Gated(Net):
    """x + gate * f(x) with the gate from the time, as one operation."""

    make = Branch

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(1, WIDTH) for _ in range(3))

    def stack(self, h, t):
        for block, gate in zip(self.blocks, self.gates, strict=True):
            h = torch.addcmul(h, gate(t[:, None])[:, None], block(h, t))
        return h


class Scaled(Net):
    def stack(self, h, t):
        for block in self.blocks:
            h = torch.lerp(h, block(h, t), 0.3) / 1.2
        return h


class HeavyText(Net):
    """A text encoder that works more than the denoiser, and does not see the sample."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x, t):
        text = torch.linspace(-1, 1, 64 * WIDTH).reshape(1, 64, WIDTH).expand(len(x), -1, -1)
        for block in self.encoder:
            text = block(text, t)
        return self.out(self.stack(self.embed(x) + text.mean(1, keepdim=True), t))


class Injected(Net):
    """Every block adds some of the embedding, too."""

    make = Branch

    def stack(self, h, t):
        first = h
        for block in self.blocks:
            h = 0.8 * h + 0.2 * first + block(h, t)
        return h


class Masked(Net):
    """Half of the tokens at a time, in place."""

    def stack(self, h, t):
        even = torch.arange(16) % 2 == 0
        for number, block in enumerate(self.blocks):
            own = even if number % 2 else ~even
            h[:, own] += (block(h, t) - h)[:, own]
        return h


class Beyond(Net):
    """Twice the block's result without its input: the input is left, once."""

    def stack(self, h, t):
        for block in self.blocks:
            h = (2 * block(h, t) - h) / 1.2
        return h


class Encoder(Net):
    def hold(self, blocks):
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def stack(self, h, t):
        return self.encoder(h * t[:, None, None])


USUAL = (Net, Outside, InPlace, Gated, Scaled, HeavyText, Injected, Masked, Beyond)
RESIDUAL = {
    **dict.fromkeys(USUAL, "blocks (3)"), Numbered: "block (3)", InDict: "enc (3)",
    Named: "layers (3)", ListOfLists: "layers (6)", Shared: "block (3)",
    Functional: "the model (3)", Encoder: "encoder.layers (3)",
}  # fmt: skip


@pytest.mark.parametrize("cls", RESIDUAL, ids=lambda cls: cls.__name__)
def test_residual_stacks_are_found_whatever_holds_them(cls):
    capture = check(seeded(cls), tokens)
    assert capture.found.stack == capture.default.stack == RESIDUAL[cls]
    assert not capture.found.is_u_shape
    assert capture.default.skipped_share > 0.6
    assert all(stream.is_residual for stream in capture.found.streams)
    assert all(stream.skeleton is not None for stream in capture.default.streams)


class Plain(Net):
    """A chain without any sum."""

    def stack(self, h, t):
        for block in self.blocks:
            h = torch.tanh(block.down(torch.relu(block.up(h))))
        return h


class PostNorm(Net):
    """The stream is normalised behind each sum: behind two blocks little of it is left."""

    def stack(self, h, t):
        for block in self.blocks:
            h = block.norm(block(h, t))
        return h


class Pruned(Net):
    """Each block drops tokens: how many depends on data."""

    def stack(self, h, t):
        h = h[:1]
        for block in self.blocks:
            h = h[:, h[0].sum(-1) > -30]
            h = block(h, t[:1])
        return h.mean(1, keepdim=True).expand(2, 16, -1)


def test_stacks_whose_sizes_depend_on_data_are_refused_with_the_place():
    refused = fxcache.explain(seeded(Pruned), *tokens()).refused[0]
    assert "a size in it depends on data" in refused
    assert "h = h[:, h[0].sum(-1) > -30]" in refused
    assert "test_cut.py" in refused


@pytest.mark.parametrize("cls", [Plain, PostNorm])
def test_stacks_that_are_no_residuals_are_refused(cls):
    with pytest.raises(StackNotFoundError, match="is no residual"):
        plain(seeded(lambda: cls(depth=5)), StepSchedule(mask=[False, True]))(*tokens())


class Frozen(Net):
    """Its output does not depend on the sample by way of the blocks."""

    def forward(self, x, t):
        constant = torch.ones(2, 16, 8)
        return self.out(self.stack(self.embed(constant), t)) + x


def test_blocks_that_do_not_see_the_sample_are_no_stack():
    with pytest.raises(StackNotFoundError, match="depends on x is a matrix product"):
        plain(seeded(Frozen))(*tokens())


class Featured(Net):
    """It returns features, too, after which two blocks follow that are no residuals."""

    def stack(self, h, t):
        for block in self.blocks[:-2]:
            h = block(h, t)
        self.features = h.repeat(1, 1, 4)
        for block in self.blocks[-2:]:
            h = torch.tanh(block(h, t))
        return h

    def forward(self, x, t):
        return super().forward(x, t), self.features


def test_a_prediction_follows_the_sample_however_small_it_is():
    """A hit that keeps it as it is, and features of eight times its memory fresh, is none."""
    assert check(seeded(lambda: Featured(depth=6)), tokens).found.skipped_share > 0.3


class Preconditioned(Net):
    """A part of the sample is added to what it predicts, and it returns features, too."""

    def __init__(self):
        super().__init__()
        self.last = Branch()

    def forward(self, x, t):
        h = self.stack(self.embed(x), t)
        return 0.5 * x + self.out(self.last(h, t)).tanh(), h


def test_what_blocks_predict_follows_the_sample_where_that_is_added_to_it():
    model = seeded(Preconditioned)
    for block in model.blocks:  # so that a hit is nearly right, if it is one
        nn.init.normal_(block.down.weight, std=1e-3)
    denoiser = plain(model, StepSchedule(mask=[False, True]))
    x, t = tokens()
    first, hit, full = denoiser(x, t)[0], denoiser(-x, 0.9 * t)[0], model(-x, 0.9 * t)[0]
    assert denoiser.report().hits == 1
    assert (hit - full).norm() < 0.05 * (full - first).norm()


class TwoInputs(Net):
    def forward(self, condition, latent, t):
        return super().forward(latent + self.embed.weight.mean() * condition, t)


def test_the_sample_is_named_where_two_inputs_look_alike():
    x, t = tokens()
    found = fxcache.explain(seeded(TwoInputs), x, x.flip(0), t)
    assert found.sample == ("latent",)
    assert "condition could be the sample, too: latent was taken" in found.notes[0]


class Joined(Net):
    """The sample has a condition among its channels; another input is laid out as the output."""

    def forward(self, latent, pose, t):
        return super().forward(latent[..., : pose.shape[-1]] + 0.1 * pose, t)


def test_a_sample_that_was_joined_with_a_condition_keeps_its_name():
    x, t = tokens()
    found = fxcache.explain(seeded(Joined), torch.cat([x, x], -1), x.flip(0), t)
    assert found.sample == ("latent",)


class Tokens(Net):
    """Discrete diffusion: token numbers in, logits out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, WIDTH)


def test_noisy_tokens_are_a_sample_too():
    model, t = seeded(Tokens), torch.ones(2)
    tokens = torch.randint(0, 8, (2, 16), generator=torch.Generator().manual_seed(0))
    moved = tokens.roll(1, -1)
    capture = captured(model, tokens, t)
    assert capture.found.sample == ("x",)
    assert len(capture.default.span_units) == 3  # of all blocks, too
    always = capture.follow(ALWAYS)
    first, hit = always(tokens, t), always(moved, 0.9 * t)
    assert capture.hits() == [False, True]
    full = model(moved, 0.9 * t)
    assert (hit - full).norm() < (first - full).norm()


def test_two_blocks_of_which_the_last_has_less_to_do():
    model, inputs = tiny_model("SD3Transformer2DModel", num_layers=2)
    found = fxcache.explain(model, **inputs)
    assert found.stack == "transformer_blocks (2)"
    assert found.skipped_share > 0.5
    assert found.audit < 1


class Twice(Small):
    """Guidance inside: all of it runs twice, once for what is to be left behind."""

    def forward(self, x, t):
        cond, uncond = super().forward(x, t), super().forward(x, 0 * t)
        return uncond + 3 * (cond - uncond)


@pytest.mark.parametrize("depth", [2, 6])
def test_a_stack_that_runs_twice(depth):
    model, given = seeded(lambda: Twice(depth)), token_inputs()
    found = fxcache.explain(model, policy=fxcache.AdaptiveCache(), **given)
    assert len(found.span_blocks) == depth
    assert found.skipped_share > 0.8  # of both
    assert_identical(plain(model, NEVER)(**given), model(**given))
