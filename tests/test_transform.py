"""The denoiser stands in for the model: same class, same names, same weights, nothing touched."""

import math

import pytest
import torch
from accelerate import hooks
from comparing import assert_close, assert_identical
from diffusers import DiTTransformer2DModel
from helpers import hits, plain, seeded
from opened import Small
from policies import ALWAYS, NEVER
from torch import nn
from zoo import make, token_inputs

import fxcache
from fxcache import AdaptiveCache, FirstBlockCache


def test_it_goes_by_the_models_names(model, denoiser):
    assert isinstance(denoiser, Small)
    assert type(denoiser).__name__ == "Small"
    assert type(denoiser).__module__ == Small.__module__
    assert denoiser.policy == ALWAYS
    assert list(denoiser.state_dict()) == list(model.state_dict())
    for (a, p), (b, q) in zip(denoiser.named_parameters(), model.named_parameters(), strict=True):
        assert a == b
        assert p is q
    assert [name for name, _ in denoiser.named_modules()] == [n for n, _ in model.named_modules()]
    assert type(type(denoiser)().eval()(**token_inputs())) is torch.Tensor  # a plain model
    assert denoiser.to(torch.float64) is denoiser
    assert model.embed.weight.dtype == torch.float64
    assert fxcache.transform(model).policy == AdaptiveCache()


def test_the_model_is_not_touched_and_given_back(model):
    before, forward = dict(vars(model)), model.forward
    denoiser = plain(model)
    denoiser(**token_inputs())
    assert vars(model) == before
    assert model.forward == forward
    assert type(model) is Small
    assert fxcache.restore(denoiser) is model
    with pytest.raises(fxcache.FxCacheError, match="was not made by"):
        fxcache.restore(model)


def test_diffusers_models_keep_their_ways(tmp_path):
    model, inputs = make("dit")
    denoiser = plain(model, NEVER)
    assert isinstance(denoiser, DiTTransformer2DModel)
    assert denoiser.config is model.config
    assert (denoiser.dtype, denoiser.device) == (torch.float32, torch.device("cpu"))
    denoiser.save_pretrained(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert_identical(again(**inputs), denoiser(**inputs))
    output = denoiser(**inputs)
    assert type(output) is type(model(**inputs))
    assert isinstance(denoiser(**inputs, return_dict=False), tuple)


def test_arguments_and_hooks(model, denoiser):
    """Positional and by name; hooks of the model run once; another shape is one more capture."""
    given, calls = token_inputs(), []
    expected = model(**given)
    model.register_forward_hook(lambda *_: calls.append("model"))
    model.blocks[0].register_forward_hook(lambda *_: None)
    assert_identical(denoiser(given["x"], given["t"]), expected)
    assert_close(denoiser(given["x"], t=given["t"]), expected)
    assert calls == ["model"] * 2
    assert denoiser.report().records[0].timestep == 1.0
    assert hits(denoiser) == [False, True]
    denoiser(**token_inputs(tokens=12))
    assert denoiser.report().recompiles == denoiser.report().graphs - 1 > 0


def test_a_forward_on_the_instance_is_called_inside_the_cache(model):
    """accelerate and diffusers' hooks write a forward on the instance."""
    original = model.forward

    def forward(x, t):
        return original(x * 2, t)

    model.forward = forward
    denoiser = plain(model)
    given = token_inputs()
    assert_identical(denoiser(**given), original(given["x"] * 2, given["t"]))
    denoiser(**given)
    assert hits(denoiser) == [False, True]
    assert vars(model)["forward"] is forward


@pytest.mark.parametrize("options", [{}, {"fullgraph": False}, {"disable": True}])
def test_a_forward_on_the_denoiser_goes_around_the_cache(model, options):
    """Offloading after transform: accelerate calls the forward that it found on the denoiser."""
    denoiser = plain(model, **options)
    given = token_inputs()
    expected = model(**given)
    hooks.add_hook_to_module(denoiser, hooks.ModelHook())
    assert_identical(denoiser(**given), expected)
    denoiser(**given)
    hooks.remove_hook_from_module(denoiser)
    denoiser(**given)
    assert hits(denoiser) == ([] if "disable" in options else [False, True, True])
    assert "forward" not in vars(model)


@torch._dynamo.config.patch(recompile_limit=2)
def test_denoisers_of_one_class_do_not_use_up_each_others_compilations(model):
    """Dynamo allows so many recompiles of a code object."""
    given = token_inputs()
    for _ in range(3):
        denoiser = plain(model)
        denoiser(**given)
        denoiser(**given)
        assert hits(denoiser) == [False, True]


def test_head_and_tail_blocks():
    model, first, second = seeded(lambda: Small(4)), token_inputs(), token_inputs()
    second["t"] = torch.full((2,), 0.9)

    def blocks(h, which):
        for block in which:
            h = block(h)
        return h

    def before(given, head):
        h = model.embed(given["x"]) + model.time(given["t"][:, None])[:, None]
        return blocks(h, model.blocks[:head])

    for head, tail in ((1, 0), (2, 1), (1, 2), (3, 0)):
        policy = FirstBlockCache(threshold=math.inf, head_blocks=head, tail_blocks=tail)
        denoiser = plain(model, policy)
        denoiser(**first)
        at, end = before(first, head), len(model.blocks) - tail
        residual = blocks(at, model.blocks[head:end]) - at
        after = blocks(before(second, head) + residual, model.blocks[end:])
        assert_close(denoiser(**second), model.out(model.norm(after)))
        assert hits(denoiser) == [False, True], (head, tail)


class NoStack(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))

    def forward(self, x, t):
        return self.net(x)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_model_without_a_stack_is_refused(fullgraph):
    for model in (NoStack().eval(), Small(depth=1).eval()):
        denoiser = plain(model, fullgraph=fullgraph)
        for _ in range(2):
            with pytest.raises(fxcache.StackNotFoundError, match="Seen: "):
                denoiser(**token_inputs())


def test_fallback_warns_once_and_runs_uncached(recwarn):
    model, given = NoStack().eval(), token_inputs()
    denoiser = plain(model, fallback=True)
    for _ in range(2):
        assert_identical(denoiser(**given), model(**given))
        assert ["uncached" in str(w.message) for w in recwarn] == [True]


def test_an_empty_span_is_refused(model):
    for blocks in ({"head_blocks": 2}, {"head_blocks": 9}, {"tail_blocks": 1}):
        with pytest.raises(fxcache.PolicyError, match="at most 1"):
            plain(model, FirstBlockCache(**blocks))(**token_inputs())


def test_the_denoiser_works_after_a_bad_call(model, denoiser):
    given = token_inputs()
    for bad in (
        {**given, "x": "no tensor"},
        {"x": given["x"]},
        {**given, "x": given["x"][..., 1:]},
    ):
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever torch says of it
            denoiser(**bad)
    assert_identical(denoiser(**given), model(**given))


def test_bad_options(model):
    for options, message in (
        ({"mode": "default", "options": {"max_autotune": False}}, "not both"),
        ({"backend": "no such backend"}, "unknown backend"),
        ({"backend": "fxcache"}, "cannot compile its own pieces"),
        ({"backend": 3}, "name or a callable"),
        ({"mode": "fastest"}, "mode='fastest'"),
        ({"options": {"no_such_option": 1}}, "no_such_option"),
        ({"sync": "all"}, "sync must be .* a torch.distributed.ProcessGroup, got 'all'"),
    ):
        with pytest.raises(fxcache.FxCacheError, match=message) as error:
            fxcache.transform(model, ALWAYS, **options)
        assert isinstance(error.value, RuntimeError)
    for bad in (None, lambda x: x, "model"):
        with pytest.raises(fxcache.FxCacheError, match=r"torch\.nn\.Module"):
            fxcache.transform(bad)


def test_blocks_that_are_compiled_are_seen_through(model):
    """Regional compilation, before transform."""
    given = token_inputs()
    expected = model(**given)
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend="eager")
    denoiser = plain(model)
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


class Lengths(Small):
    """The number of tokens is an argument, and no tensor shows it."""

    def forward(self, x, t, n):
        h = self.embed(x[:, :1]).expand(-1, n, -1) + self.time(t[:, None])[:, None]
        return self.out(self.norm(self.stack(h)))


@pytest.mark.parametrize("dynamic", [None, True])
def test_integer_arguments_are_part_of_the_layout(dynamic):
    """And dynamic shapes share one compilation."""
    model = seeded(Lengths)
    denoiser = plain(model, dynamic=dynamic)
    shapes = ((2, 8, 4), (2, 8, 6), (2, 8, 7), *([(3, 8, 7), (4, 5, 6)] if dynamic else []))
    for batch, tokens, n in shapes:
        given = {**token_inputs(batch, tokens), "n": n}
        assert_identical(denoiser(**given), model(**given))
    assert_close(denoiser(**given), model(**given))
    assert hits(denoiser) == [False] * len(shapes) + [True]
    if dynamic:
        assert (denoiser.report().graphs, denoiser.report().recompiles) == (1, 0)
