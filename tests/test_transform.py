"""The denoiser stands in for the model: same class, same names, same weights, nothing touched."""

import dataclasses
import io
import math
import warnings

import pytest
import torch
from helpers import ALWAYS, NEVER, assert_close, assert_identical, hits
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import (
    Block,
    BreaksAfter,
    BreaksBefore,
    Denoiser,
    SequentialDiT,
    make,
    token_inputs,
)

import fxcache
from fxcache import AdaptiveCache, FirstBlockCache, Taylor


def test_it_is_an_instance_of_the_models_class(model, denoiser):
    assert isinstance(denoiser, SequentialDiT)
    assert type(denoiser).__name__ == "SequentialDiT"
    assert type(denoiser).__module__ == SequentialDiT.__module__


def test_names_and_parameters_are_the_models(model, denoiser):
    assert list(denoiser.state_dict()) == list(model.state_dict())
    for (a, p), (b, q) in zip(denoiser.named_parameters(), model.named_parameters(), strict=True):
        assert a == b
        assert p is q
    assert [name for name, _ in denoiser.named_modules()] == [n for n, _ in model.named_modules()]


def test_the_model_is_not_touched(model):
    before = dict(vars(model))
    forward = model.forward
    denoiser = fxcache.transform(model, ALWAYS, backend="eager")
    denoiser(**token_inputs())
    assert vars(model) == before
    assert model.forward == forward
    assert type(model) is SequentialDiT


def test_restore_gives_back_the_model_itself(model, denoiser):
    assert fxcache.restore(denoiser) is model
    with pytest.raises(fxcache.FxCacheError, match="was not made by"):
        fxcache.restore(model)


def test_diffusers_models_keep_their_ways(tmp_path):
    pytest.importorskip("diffusers")
    from diffusers import DiTTransformer2DModel

    model, inputs = make("dit")
    denoiser = fxcache.transform(model, NEVER, backend="eager")
    assert isinstance(denoiser, DiTTransformer2DModel)
    assert denoiser.config is model.config
    assert (denoiser.dtype, denoiser.device) == (torch.float32, torch.device("cpu"))
    denoiser.save_pretrained(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert_identical(again(**inputs), denoiser(**inputs))
    output = denoiser(**inputs)
    assert type(output) is type(model(**inputs))
    assert isinstance(denoiser(**inputs, return_dict=False), tuple)


def test_to_and_load_state_dict_work_through_the_denoiser(model, denoiser):
    given = token_inputs()
    denoiser(**given)
    weights = {k: torch.randn_like(v) * 0.1 for k, v in model.state_dict().items()}
    denoiser.load_state_dict(weights)
    denoiser.reset()
    assert_identical(denoiser(**given), model(**given))
    assert denoiser.to(torch.float64) is denoiser
    assert model.embed.weight.dtype == torch.float64


def test_replaced_weights_are_seen(model, denoiser):
    given = token_inputs()
    denoiser(**given)
    model.blocks[2].proj = nn.Linear(16, 16)
    denoiser.reset()
    assert_identical(denoiser(**given), model(**given))


def test_positional_and_keyword_arguments(model, denoiser):
    given = token_inputs()
    expected = model(**given)
    assert_identical(denoiser(given["x"], given["t"]), expected)
    assert_close(denoiser(given["x"], t=given["t"]), expected)
    assert denoiser.report().records[0].timestep == 1.0
    assert hits(denoiser) == [False, True]


def test_hooks_run_once(model, denoiser):
    calls = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    model.blocks[0].register_forward_hook(lambda *_: None)
    denoiser(**token_inputs())
    assert calls == ["model"]


def test_a_forward_on_the_instance_is_called_inside_the_cache(model):
    """accelerate and diffusers' hooks write a forward on the instance."""
    original = model.forward

    def forward(x, t):
        return original(x * 2, t)

    model.forward = forward
    denoiser = fxcache.transform(model, ALWAYS, backend="eager")
    given = token_inputs()
    assert_identical(denoiser(**given), original(given["x"] * 2, given["t"]))
    denoiser(**given)
    assert hits(denoiser) == [False, True]
    assert vars(model)["forward"] is forward


@pytest.mark.parametrize("options", [{}, {"fullgraph": False}, {"disable": True}])
def test_a_forward_on_the_denoiser_goes_around_the_cache(model, options):
    """Offloading after transform: accelerate calls the forward that it found on the denoiser."""
    hooks = pytest.importorskip("accelerate.hooks")
    denoiser = fxcache.transform(model, ALWAYS, backend="eager", **options)
    given = token_inputs()
    expected = model(**given)
    hooks.add_hook_to_module(denoiser, hooks.ModelHook())
    assert_identical(denoiser(**given), expected)
    denoiser(**given)
    hooks.remove_hook_from_module(denoiser)
    denoiser(**given)
    assert hits(denoiser) == ([] if "disable" in options else [False, True, True])
    assert "forward" not in vars(model)


def test_classmethods_make_plain_models(denoiser):
    plain = type(denoiser)().eval()
    assert plain(**token_inputs()).shape == (2, 8, 4)


def test_disable_runs_the_model(model):
    denoiser = fxcache.transform(model, ALWAYS, disable=True)
    given = token_inputs()
    assert_identical(denoiser(**given), model(**given))
    assert hits(denoiser) == []


def test_no_policy_means_adaptive_cache(model):
    denoiser = fxcache.transform(model, backend="eager")
    assert denoiser.policy == AdaptiveCache()


def test_denoisers_of_one_class_do_not_use_up_each_others_compilations(model):
    given = token_inputs()
    for _ in range(12):  # Dynamo allows eight recompiles a code object
        denoiser = fxcache.transform(model, ALWAYS, backend="eager")
        denoiser(**given)
        denoiser(**given)
        assert hits(denoiser) == [False, True]


@dataclasses.dataclass
class Prediction:
    noise: torch.Tensor
    aux: dict


class Structured(SequentialDiT):
    def forward(self, x, t):
        noise = super().forward(x, t)
        return Prediction(noise, {"x": x, "mean": noise.mean(1)})


def test_output_types_are_kept():
    torch.manual_seed(0)
    model = Structured().eval()
    denoiser = fxcache.transform(model, ALWAYS, backend="eager")
    given = token_inputs()
    for _ in range(2):
        output = denoiser(**given)
        assert type(output) is Prediction
        assert output.aux["x"] is given["x"]
        assert_close(output.noise, model(**given).noise)


def test_pickle_round_trip(model, denoiser):
    given = token_inputs()
    buffer = io.BytesIO()
    torch.save(denoiser, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert_identical(again(**given), model(**given))


# --- head and tail blocks ---


@pytest.mark.parametrize(("head", "tail"), [(1, 0), (2, 0), (1, 1), (2, 1), (1, 2), (3, 0)])
def test_head_and_tail_blocks(model, head, tail):
    policy = FirstBlockCache(threshold=math.inf, head_blocks=head, tail_blocks=tail)
    denoiser = fxcache.transform(model, policy, backend="eager")
    first, second = token_inputs(), token_inputs()
    first["t"], second["t"] = torch.ones(2), torch.full((2,), 0.9)
    denoiser(**first)

    def blocks(h, which):
        for block in which:
            h = block(h)
        return h

    def before(given):
        h = model.embed(given["x"]) + model.time(given["t"][:, None])[:, None]
        return blocks(h, model.blocks[:head])

    span = model.blocks[head : len(model.blocks) - tail]
    residual = blocks(before(first), span) - before(first)
    after = blocks(before(second) + residual, model.blocks[len(model.blocks) - tail :])
    assert_close(denoiser(**second), model.out(model.norm(after)))


# --- errors ---


class NoStack(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))

    def forward(self, x, t):
        return self.net(x)


@pytest.mark.parametrize("model", [NoStack(), SequentialDiT(depth=1)], ids=["none", "one block"])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_model_without_a_stack_is_refused(model, fullgraph):
    denoiser = fxcache.transform(model.eval(), ALWAYS, backend="eager", fullgraph=fullgraph)
    for _ in range(2):
        with pytest.raises(fxcache.StackNotFoundError, match="Seen: "):
            denoiser(**token_inputs())


def test_fallback_warns_once_and_runs_uncached():
    model = NoStack().eval()
    denoiser = fxcache.transform(model, ALWAYS, backend="eager", fallback=True)
    given = token_inputs()
    with pytest.warns(UserWarning, match="uncached"):
        assert_identical(denoiser(**given), model(**given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_identical(denoiser(**given), model(**given))


@pytest.mark.parametrize("blocks", [{"head_blocks": 4}, {"head_blocks": 9}, {"tail_blocks": 3}])
def test_an_empty_span_is_refused(model, blocks):
    denoiser = fxcache.transform(model, FirstBlockCache(**blocks), backend="eager")
    with pytest.raises(fxcache.PolicyError, match="at most 3"):
        denoiser(**token_inputs())


def test_the_denoiser_works_after_a_bad_call(model, denoiser):
    given = token_inputs()
    for bad in (
        {"x": "no tensor", "t": given["t"]},
        {"x": given["x"]},
        {"x": torch.ones(2, 8, 3), "t": given["t"]},
    ):
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever torch says of it
            denoiser(**bad)
    assert_identical(denoiser(**given), model(**given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "default", "options": {"max_autotune": False}}, "not both"),
        ({"backend": "no such backend"}, "unknown backend"),
        ({"backend": "fxcache"}, "cannot compile its own pieces"),
        ({"backend": 3}, "name or a callable"),
        ({"mode": "fastest"}, "mode='fastest'"),
        ({"options": {"no_such_option": 1}}, "no_such_option"),
        ({"sync": "all"}, "sync must be .* a torch.distributed.ProcessGroup, got 'all'"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(fxcache.FxCacheError, match=message) as error:
        fxcache.transform(model, ALWAYS, **options)
    assert isinstance(error.value, RuntimeError)


@pytest.mark.parametrize("bad", [None, lambda x: x, "model"])
def test_only_modules_are_transformed(bad):
    with pytest.raises(fxcache.FxCacheError, match=r"torch\.nn\.Module"):
        fxcache.transform(bad)


def test_blocks_that_are_compiled_are_seen_through(model):
    """Regional compilation, before transform."""
    given = token_inputs()
    expected = model(**given)
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend="eager")
    denoiser = fxcache.transform(model, ALWAYS, backend="eager")
    assert_identical(denoiser(**given), expected)
    denoiser(**given)
    assert hits(denoiser) == [False, True]


def test_what_is_transformed_or_compiled_already_is_refused(model, denoiser):
    with pytest.raises(fxcache.FxCacheError, match="already"):
        fxcache.transform(denoiser)
    with pytest.raises(fxcache.FxCacheError, match="compiled already"):
        fxcache.transform(torch.compile(model, backend="eager"))
    with pytest.raises(fxcache.PolicyError, match="must be a policy"):
        fxcache.transform(model, 0.08)
    with pytest.raises(fxcache.FxCacheError, match="compiled already"):
        denoiser.compile()
    model.compile(backend="eager")
    with pytest.raises(fxcache.FxCacheError, match="compiled already"):
        fxcache.transform(model)


# --- graph breaks, dynamic shapes ---


@pytest.mark.parametrize("cls", [BreaksBefore, BreaksAfter])
def test_graph_breaks_outside_the_stack(cls):
    torch.manual_seed(0)
    model = cls().eval()
    given = token_inputs()
    denoiser = fxcache.transform(model, ALWAYS, backend="eager", fullgraph=False)
    assert_identical(denoiser(**given), model(**given))
    assert_close(denoiser(**given), model(**given))
    assert hits(denoiser) == [False, True]
    denoiser(given["x"], given["t"] + 1)  # the timestep is seen, wherever the graph broke
    assert hits(denoiser) == [False, True, False]
    strict = fxcache.transform(model, ALWAYS, backend="eager", fullgraph=True)
    with pytest.raises(fxcache.CaptureError, match="could not be captured in one graph"):
        strict(**given)


class KeywordTime(BreaksBefore):
    def forward(self, x, *, timestep):
        return super().forward(x, timestep)


def test_a_keyword_only_time_input_is_seen_behind_a_graph_break():
    denoiser = fxcache.transform(KeywordTime().eval(), ALWAYS, backend="eager", fullgraph=False)
    for t in (1.0, 0.9, 1.0):
        denoiser(token_inputs()["x"], timestep=torch.full((2,), t))
    assert [r.timestep for r in denoiser.report().records] == pytest.approx([1.0, 0.9, 1.0])
    assert hits(denoiser) == [False, True, False]


class BreaksInTheMiddle(SequentialDiT):
    """Two lists of about the same weight, with a break between: same layouts on both sides."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList(Block(4) for _ in range(4))
        self.second = nn.ModuleList(Block(4) for _ in range(5))
        del self.blocks

    def forward(self, x):
        for block in self.first:
            x = block(x)
        torch._dynamo.graph_break()
        for block in self.second:
            x = block(x)
        return x


def test_the_parts_of_a_broken_stack_never_share_a_residual(caplog):
    torch.manual_seed(0)
    model = BreaksInTheMiddle().eval()
    denoiser = fxcache.transform(model, ALWAYS, backend="eager", fullgraph=False)
    x = token_inputs()["x"]
    for _ in range(3):
        assert_close(denoiser(x), model(x))
    assert not any(hits(denoiser))
    assert "in the midst of its block stack" in caplog.text


class BreaksInside(SequentialDiT):
    def stack(self, h):
        for block in self.blocks:
            h = block(h)
            torch._dynamo.graph_break()
        return h


def test_denoisers_behind_graph_breaks_do_not_use_up_each_others_compilations():
    for _ in range(10):
        model = BreaksBefore().eval()
        denoiser = fxcache.transform(model, ALWAYS, backend="eager", fullgraph=False)
        denoiser(**token_inputs())


def test_fallback_when_the_capture_fails():
    denoiser = fxcache.transform(BreaksInside().eval(), ALWAYS, backend="aot_eager", fallback=True)
    with pytest.warns(UserWarning, match="uncached"):
        denoiser(**token_inputs())


def test_graph_breaks_inside_the_stack_are_refused():
    denoiser = fxcache.transform(BreaksInside().eval(), ALWAYS, backend="eager", fullgraph=False)
    with pytest.raises(fxcache.StackNotFoundError, match="graph"):
        denoiser(**token_inputs())


def test_dynamic_shapes_share_one_compilation(model):
    denoiser = fxcache.transform(model, ALWAYS, backend="eager", dynamic=True)
    for batch, tokens in ((2, 8), (3, 8), (2, 12), (4, 6)):
        given = token_inputs(batch, tokens)
        assert_identical(denoiser(**given), model(**given))
        assert_close(denoiser(**given), model(**given))
    assert hits(denoiser) == [False, True] * 4
    assert denoiser.report().graphs == 1
    assert denoiser.report().recompiles == 0


class Lengths(SequentialDiT):
    """The number of tokens is an argument, and no tensor shows it."""

    def forward(self, x, t, n):
        h = self.embed(x[:, :1]).expand(-1, n, -1) + self.time(t[:, None])[:, None]
        return self.out(self.norm(self.stack(h)))


@pytest.mark.parametrize("dynamic", [None, True])
def test_integer_arguments_are_part_of_the_layout(dynamic):
    torch.manual_seed(0)
    model = Lengths().eval()
    denoiser = fxcache.transform(model, ALWAYS, backend="eager", dynamic=dynamic)
    given = token_inputs()
    for n in (4, 6, 7):
        assert_identical(denoiser(**given, n=n), model(**given, n=n))
    denoiser(**given, n=7)
    assert hits(denoiser) == [False, False, False, True]


def test_recompiles_are_counted(model, denoiser):
    for tokens in (8, 12):
        given = token_inputs(tokens=tokens)
        denoiser(**given)
    assert (denoiser.report().graphs, denoiser.report().recompiles) == (2, 1)


# --- awkward models ---


class InPlaceBlock(Block):
    def forward(self, x):
        x += self.proj(self.norm1(x))
        x[:, 0] = x[:, 0] + 1
        return x


class InPlace(Denoiser):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(InPlaceBlock(16) for _ in range(3))

    def stack(self, h):
        for block in self.blocks:
            h = block(h)
        return h


class Autocast(SequentialDiT):
    def stack(self, h):
        with torch.autocast("cpu", torch.bfloat16):
            for block in self.blocks:
                h = block(h)
        return h.float()


class PostNormBlock(Block):
    def forward(self, x):
        return self.norm1(x + self.mlp(x))


class PostNorm(SequentialDiT):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(PostNormBlock(16) for _ in range(3)))


class Looped(SequentialDiT):
    """The same two blocks, three times over."""

    def stack(self, h):
        for _ in range(3):
            for block in self.blocks[:2]:
                h = block(h)
        return h


class ZeroGates(SequentialDiT):
    """Blocks that start as identities: the head residual is 0."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            for layer in (block.proj, block.mlp[2]):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)


class MathAttentionBlock(Block):
    def forward(self, x):
        with sdpa_kernel([SDPBackend.MATH]):
            return super().forward(x)


class MathAttention(SequentialDiT):
    """Asks for an attention backend inside its blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(MathAttentionBlock(16) for _ in range(3)))


class IntoBuffer(SequentialDiT):
    """The stream is a view of a tensor that is written behind the stack."""

    def stack(self, h):
        buffer = torch.zeros(h.shape[0], h.shape[1] + 2, h.shape[2])
        view = buffer[:, 2:]
        view.copy_(h)
        for block in self.blocks:
            view = block(view)
        buffer[:, 2:] = view
        return buffer


class Tokens(SequentialDiT):
    """Indices run through the blocks beside the stream: they are kept, never extrapolated."""

    def stack(self, h):
        index = torch.arange(h.shape[1])
        for block in self.blocks:
            h = block(h)
            index = (index + 1 + 0 * h.sum().long()) % h.shape[1]
        return h[:, index]


AWKWARD = [
    InPlace,
    Autocast,
    PostNorm,
    Looped,
    ZeroGates,
    MathAttention,
    IntoBuffer,
    Tokens,
]


@pytest.mark.parametrize("cls", AWKWARD)
def test_awkward_models_through_autograds_front_end(cls):
    """aot_eager functionalizes as Inductor does: aliases and in-place writes must survive."""
    torch.manual_seed(0)
    model = cls().eval()
    denoiser = fxcache.transform(model, ALWAYS, backend="aot_eager")
    given = token_inputs()
    for _ in range(2):
        tolerance = 2e-2 if cls is Autocast else 1e-5
        assert_close(denoiser(**given), model(**given), tolerance)
    assert hits(denoiser) == [False, True]


@pytest.mark.parametrize("cls", AWKWARD)
@pytest.mark.parametrize("forecast", [fxcache.Reuse(), Taylor(order=1)])
def test_awkward_models(cls, forecast):
    torch.manual_seed(0)
    model = cls().eval()
    never = fxcache.transform(model, NEVER, backend="eager")
    policy = FirstBlockCache(threshold=math.inf, forecast=forecast)
    always = fxcache.transform(model, policy, backend="eager")
    for t in (1.0, 0.9, 0.8):
        given = {"x": torch.randn(2, 8, 4), "t": torch.full((2,), t)}
        assert_identical(never(**given), model(**given))
    given["t"] = torch.ones(2)
    always(**given)
    assert_close(always(**given), model(**given), tolerance=2e-2 if cls is Autocast else 1e-5)
    assert hits(always) == [False, True]


class WritingBlock(Block):
    def forward(self, x, log):
        x = super().forward(x)
        log.add_(x)
        return x


class WritesAcross(Denoiser):
    """The span writes into a tensor that the head made and the tail reads."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(WritingBlock(16) for _ in range(3))

    def stack(self, h):
        log = torch.zeros_like(h)
        for block in self.blocks:
            h = block(h, log)
        return h + log


def test_writes_across_the_cut_are_followed():
    """In the functional graph they are values like others."""
    torch.manual_seed(0)
    model = WritesAcross().eval()
    denoiser = fxcache.transform(model, ALWAYS, backend="eager")
    given = token_inputs()
    assert_identical(denoiser(**given), model(**given))
    assert_close(denoiser(**given), model(**given))
    assert hits(denoiser) == [False, True]


class WritesItsInput(SequentialDiT):
    def forward(self, x, t):
        y = super().forward(x, t)
        x.add_(y)
        return y


def test_a_span_that_computes_what_is_written_into_an_input_is_refused():
    denoiser = fxcache.transform(WritesItsInput().eval(), ALWAYS, backend="eager")
    with pytest.raises(fxcache.CaptureError, match="writes in place into x"):
        denoiser(**token_inputs())
