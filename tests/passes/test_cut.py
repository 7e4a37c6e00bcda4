"""What the pass finds in small architectures, by what flows in them and not by their names."""

import math
from collections import OrderedDict

import pytest
import torch
from helpers import ALWAYS, NEVER, assert_close, assert_identical, hits, plain, tensors
from torch import nn
from torch.nn import functional

import fxcache
from fxcache import MagCache, StackNotFoundError, StepSchedule

WIDTH = 32


class Branch(nn.Module):
    """What a block adds to its stream."""

    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, t):
        return self.down(torch.tanh(self.up(self.norm(x)) * t[:, None, None]))


class Residual(Branch):
    def forward(self, x, t):
        return x + super().forward(x, t)


class Net(nn.Module):
    """Tokens in, blocks, tokens out."""

    def __init__(self, make=Residual, depth=5):
        super().__init__()
        self.embed, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.hold([make() for _ in range(depth)])

    def hold(self, blocks):
        self.blocks = nn.ModuleList(blocks)

    def each(self):
        return self.blocks

    def stack(self, h, t):
        for block in self.each():
            h = block(h, t)
        return h

    def forward(self, x, t):
        return self.out(self.stack(self.embed(x), t))


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

    def __init__(self):
        super().__init__(Branch)

    def stack(self, h, t):
        for block in self.blocks:
            h = h + block(h, t)
        return h


class Shared(Net):
    """One block, called again and again."""

    def hold(self, blocks):
        self.block = blocks[0]

    def each(self):
        return [self.block] * 5


class Functional(nn.Module):
    """No modules at all."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) / 8 for _ in range(10))
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

    def __init__(self):
        super().__init__(Branch)
        self.gates = nn.ModuleList(nn.Linear(1, WIDTH) for _ in range(5))

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
        self.encoder = nn.ModuleList(Residual() for _ in range(12))

    def forward(self, x, t):
        text = torch.linspace(-1, 1, 64 * WIDTH).reshape(1, 64, WIDTH).expand(len(x), -1, -1)
        for block in self.encoder:
            text = block(text, t)
        return self.out(self.stack(self.embed(x) + text.mean(1, keepdim=True), t))


class Injected(Net):
    """Every block adds some of the embedding, too."""

    def __init__(self):
        super().__init__(Branch)

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
        self.encoder = nn.TransformerEncoder(layer, 5, enable_nested_tensor=False)

    def stack(self, h, t):
        return self.encoder(h * t[:, None, None])


RESIDUAL = {
    Net: "blocks (5)",
    Numbered: "block (5)",
    InDict: "enc (5)",
    Named: "layers (5)",
    ListOfLists: "layers (10)",
    Outside: "blocks (5)",
    Shared: "block (5)",
    Functional: "the model (5)",
    InPlace: "blocks (5)",
    Gated: "blocks (5)",
    Scaled: "blocks (5)",
    HeavyText: "blocks (5)",
    Injected: "blocks (5)",
    Masked: "blocks (5)",
    Beyond: "blocks (5)",
    Encoder: "encoder.layers (5)",
}


def seeded(cls):
    torch.manual_seed(0)
    return cls().eval().requires_grad_(False)


def tokens(step=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(2, 16, 8, generator=generator) for _ in range(2))
    return x + 0.1 * step * noise, torch.full((2,), 1 - 0.05 * step)


def check(model, at, **options):
    """The promises that hold for every model that is not refused."""
    never = plain(model, NEVER, **options)
    for step in range(2):
        assert_identical(never(*at(step)), model(*at(step)))
    always = plain(model, ALWAYS, **options)
    first = always(*at(0))
    assert_close(always(*at(0)), first)  # a hit on the same input gives the same output
    hit, full = tensors(always(*at(1)))[0], tensors(model(*at(1)))[0]
    assert hits(always) == [False, True, True]
    moved = (full - tensors(first)[0]).norm()
    return float((hit - full).norm() / moved)


@pytest.mark.parametrize("cls", RESIDUAL, ids=lambda cls: cls.__name__)
def test_residual_stacks_are_found_whatever_holds_them(cls):
    model = seeded(cls)
    found = fxcache.explain(model, *tokens())
    assert found.stack == RESIDUAL[cls]
    assert not found.is_u_shape
    assert found.audit < 1
    assert found.skipped_share > 0.6
    assert all(stream.is_residual for stream in found.streams)
    assert check(model, tokens) < 1


# --- what is no stream ---


class Hinted(Net):
    """A control's hint is added behind each block: no residual path begins at it."""

    def __init__(self):
        super().__init__()
        self.zero = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x, t):
        control = torch.linspace(-2, 2, WIDTH).expand(len(x), 16, -1)
        h = self.embed(x)
        for block, zero in zip(self.blocks, self.zero, strict=True):
            h = block(h, t) + zero(control)
        return self.out(h)


class Tabled(Net):
    """A position table of its own for every block."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 2, 16, WIDTH))

    def stack(self, h, t):
        for block, positions in zip(self.blocks, self.table, strict=True):
            h = block(h + positions, t)
        return h


@pytest.mark.parametrize("cls", [Hinted, Tabled])
@pytest.mark.parametrize(
    "policy",
    [StepSchedule(mask=[False, True]), MagCache(ratios=[1.0, 1.0], retention_ratio=0.0)],
    ids=["schedule", "mag"],
)
def test_a_hit_continues_the_stream_and_not_what_is_added_to_it(cls, policy):
    model = seeded(cls)
    x, t = tokens()
    moved = x + 1.0
    denoiser = plain(model, policy)
    with denoiser.trajectory(num_steps=2):
        first = denoiser(x, t)
        hit = denoiser(moved, 0.9 * t)
    assert hits(denoiser) == [False, True]
    assert_close(hit - first, model.out(model.embed(moved)) - model.out(model.embed(x)), 1e-4)


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
        plain(seeded(cls), StepSchedule(mask=[False, True]))(*tokens())


class Frozen(Net):
    """Its output does not depend on the sample by way of the blocks."""

    def forward(self, x, t):
        constant = torch.ones(2, 16, 8)
        return self.out(self.stack(self.embed(constant), t)) + x


def test_blocks_that_do_not_see_the_sample_are_no_stack():
    with pytest.raises(StackNotFoundError, match="depends on x is a matrix product"):
        plain(seeded(Frozen))(*tokens())


class SkipSum(Net):
    """WaveNet: each block hands a stream on and leaves a skip; what is read is the skips' sum."""

    def forward(self, x, t):
        h, skips = self.embed(x), []
        for block in self.blocks:
            both = block.down(torch.tanh(block.up(h) * t[:, None, None]))
            h, skips = (h + both) / math.sqrt(2), [*skips, torch.sigmoid(both)]
        return self.out(torch.stack(skips).sum(0) / math.sqrt(5))


def test_sums_of_skips():
    assert check(seeded(SkipSum), tokens) < 1
    assert fxcache.explain(seeded(SkipSum), *tokens()).audit < 1


# --- several streams ---


class Joint(nn.Module):
    """Text and image beside each other, then in one sequence; the text does not see the sample."""

    def __init__(self):
        super().__init__()
        self.embed, self.text = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH)
        self.doubles = nn.ModuleList(Residual() for _ in range(3))
        self.singles = nn.ModuleList(Residual() for _ in range(4))
        self.mix = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, 8)

    def forward(self, x, t):
        image, text = self.embed(x), self.text(torch.ones(2, 4, 8))
        for block, mix in zip(self.doubles, self.mix, strict=True):
            both = block(torch.cat([text, image], 1), t)
            added = torch.tanh(mix(both.mean(1, keepdim=True)))
            text, image = text + both[:, :4] * added, image + both[:, 4:] * added
        joint = torch.cat([text, image], 1)
        for block in self.singles:
            joint = block(joint, t)
        return self.out(joint[:, 4:])


def test_double_and_single_blocks_are_one_stack():
    found = fxcache.explain(seeded(Joint), *tokens())
    assert len(found.streams) == 1
    assert found.streams[0].shape == (2, 16, WIDTH)  # of the image alone
    assert found.audit < 1
    assert check(seeded(Joint), tokens) < 1


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.more = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x, t):
        z = torch.fft.fft(self.embed(x) * (1 + t[:, None, None]), dim=1)
        for real, imaginary in zip(self.blocks, self.more, strict=True):
            z = z + torch.complex(real(z.real).tanh(), imaginary(z.imag).tanh())
        return self.out(torch.fft.ifft(z, dim=1).real)


def test_complex_streams():
    assert check(seeded(Complex), tokens) < 1


# --- U shapes ---


class Block2d(nn.Module):
    def __init__(self, given, made):
        super().__init__()
        self.first = nn.Conv2d(given, made, 3, padding=1)
        self.second = nn.Conv2d(made, made, 3, padding=1)
        self.skip = nn.Conv2d(given, made, 1)

    def forward(self, x, t):
        return self.skip(x) + self.second(torch.tanh(self.first(x) + t[:, None, None, None]))


class UNet(nn.Module):
    """Levels in lists of lists, skips joined before each block."""

    mode = "nearest"

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 1)
        sizes = [(16, 16), (16, 32), (32, 32)]
        self.downs = nn.ModuleList(
            nn.ModuleList([Block2d(a, a), Block2d(a, a), nn.Conv2d(a, b, 4, 2, 1)])
            for a, b in sizes
        )
        self.middle = Block2d(32, 32)
        self.ups = nn.ModuleList(
            nn.ModuleList([Block2d(b + a, b), Block2d(b + a, a)]) for a, b in reversed(sizes)
        )

    def forward(self, x, t):
        h, skips = self.embed(x), []
        for first, second, down in self.downs:
            h = first(h, t)
            skips.append(h)
            h = second(h, t)
            skips.append(h)
            h = down(h)
        h = self.middle(h, t)
        for first, second in self.ups:
            h = functional.interpolate(h, scale_factor=2, mode=self.mode)
            h = first(torch.cat([h, skips.pop()], 1), t)
            h = second(torch.cat([h, skips.pop()], 1), t)
        return self.out(h)


def pictures(step=0):
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(2, 3, 16, 16, generator=generator) for _ in range(2))
    return x + 0.1 * step * noise, torch.full((2,), 1 - 0.05 * step)


@pytest.mark.parametrize(
    "policy", [ALWAYS, StepSchedule(mask=[False, True])], ids=["first", "schedule"]
)
def test_a_u_shape_is_cut_where_its_hits_follow(policy):
    found = fxcache.explain(seeded(UNet), *pictures(), policy=policy)
    assert found.audit < 1
    assert found.skipped_share > 0.5


def test_a_hit_on_a_u_shape_follows_the_sample():
    assert fxcache.explain(seeded(UNet), *pictures()).is_u_shape
    assert check(seeded(UNet), pictures) < 1


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_resampling_is_the_models_own(mode):
    """`check` asks for the same bits; a trace would replace it by formulas."""
    model = seeded(UNet)
    model.mode = mode
    check(model, pictures)


# --- samples ---


class TwoInputs(Net):
    def forward(self, condition, latent, t):
        return super().forward(latent + self.embed.weight.mean() * condition, t)


def test_the_sample_is_named_where_two_inputs_look_alike():
    x, t = tokens()
    found = fxcache.explain(seeded(TwoInputs), x, x.flip(0), t)
    assert found.sample == ("latent",)
    assert "condition could be the sample, too: latent was taken" in found.notes[0]


class Tokens(Net):
    """Discrete diffusion: token numbers in, logits out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, WIDTH)


def test_noisy_tokens_are_a_sample_too():
    model, t = seeded(Tokens), torch.ones(2)
    tokens = torch.randint(0, 8, (2, 16), generator=torch.Generator().manual_seed(0))
    moved = tokens.roll(1, -1)
    assert fxcache.explain(model, tokens, t).sample == ("x",)
    assert len(fxcache.explain(model, tokens, t).span_blocks) == 5  # of all blocks, too
    always = plain(model, ALWAYS)
    first, hit = always(tokens, t), always(moved, 0.9 * t)
    assert hits(always) == [False, True]
    full = model(moved, 0.9 * t)
    assert (hit - full).norm() < (first - full).norm()


@pytest.mark.parametrize("cls", ["SD3Transformer2DModel", "QwenImageTransformer2DModel"])
def test_two_blocks_of_which_the_last_has_less_to_do(cls):
    pytest.importorskip("diffusers")
    from fxcache.pipelines.tiny import tiny_model

    model, inputs = tiny_model(cls, num_layers=2)
    found = fxcache.explain(model, **inputs)
    assert found.stack == "transformer_blocks (2)"
    assert found.skipped_share > 0.5
    assert found.audit < 1
