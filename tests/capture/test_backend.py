"""``torch.compile(model, backend="fxcache")``, the same pass under torch's own roof.

That it decides and computes as a denoiser does is in tests/test_guarantees.py.
"""

import pytest
import torch
from comparing import assert_close, assert_identical, count_products
from helpers import hits, plain, seeded
from policies import ALWAYS
from zoo import BreaksAfter, BreaksBefore

import fxcache


def compiled(model, policy, **options):
    options = {"policy": policy, "backend": "eager", **options}
    return torch.compile(model, backend="fxcache", options=options)


def at(t, seed=0):
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(seed))
    return x, torch.full((2,), t)


def test_the_default_is_adaptive_cache_and_inductor(model, caplog):
    caplog.set_level("INFO", logger="fxcache")
    assert "fxcache" in torch._dynamo.list_backends()
    plain = torch.compile(model, backend="fxcache")
    assert_close(plain(*at(1.0)), model(*at(1.0)))
    assert "2 of 2 units" in caplog.text  # without a head block that is measured
    counters = torch._dynamo.utils.counters["inductor"]
    assert sum(counters.values()) > 0


def test_gradients_are_right_and_nothing_is_cached(model, caplog):
    always = compiled(model, ALWAYS)
    with torch.enable_grad():
        for _ in range(2):
            x, t = at(1.0)
            y = x.clone()
            got, expected = always(x.requires_grad_(), t), model(y.requires_grad_(), t)
            assert_identical(got, expected)
            got.square().sum().backward(), expected.square().sum().backward()
            assert_close(x.grad, y.grad)
    assert "gradients are enabled" in caplog.text


def test_errors_name_their_cause(model):
    with pytest.raises(Exception, match="leave no span"):
        compiled(model, fxcache.FirstBlockCache(head_blocks=4))(*at(1.0))
    with pytest.raises(Exception, match="unknown backend"):
        compiled(model, ALWAYS, backend="nonsense")(*at(1.0))
    with pytest.raises(Exception, match="must be a policy"):
        compiled(model, "first block")(*at(1.0))
    with pytest.raises(Exception, match="no block stack"):
        compiled(torch.nn.Sequential(torch.nn.Linear(4, 4)), ALWAYS)(torch.ones(2, 8, 4))


@pytest.mark.parametrize("cls", [BreaksBefore, BreaksAfter])
def test_graph_breaks_outside_the_stack(cls):
    model = seeded(cls)
    always = compiled(model, ALWAYS)
    assert_identical(always(*at(1.0)), model(*at(1.0)))
    whole = count_products(lambda: model(*at(1.0)))
    assert count_products(lambda: always(*at(1.0))) < whole / 2


def steps(denoiser, x, num_steps=4):
    """A loop that announces its trajectory and names its branch."""
    with denoiser.trajectory(num_steps=num_steps):
        for i in range(num_steps):
            with denoiser.branch("cond"):
                x = x - 0.1 * denoiser(x, torch.full((2,), 1 - i / num_steps))
    return x


def test_a_compiled_loop_is_cut_at_the_denoiser(model):
    denoiser = plain(model, ALWAYS)
    x, _ = at(1.0)
    expected, made = steps(denoiser, x), hits(denoiser)
    compiled_steps = torch.compile(steps, backend="eager")
    for _ in range(2):
        denoiser.reset()
        assert_identical(compiled_steps(denoiser, x), expected)
        assert hits(denoiser) == made == [False, True, True, True]
    assert denoiser.report().graphs == 1


def test_it_cannot_be_a_part_of_one_graph(model):
    denoiser = plain(model, ALWAYS)
    whole = torch.compile(lambda x, t: x + denoiser(x, t), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fxcache compiles the denoiser itself"):
        whole(*at(1.0))
    assert hits(denoiser) == []


def test_what_is_disabled_may_be_a_part_of_one_graph(model):
    denoiser = fxcache.transform(model, ALWAYS, backend="eager", disable=True)
    whole = torch.compile(denoiser, backend="eager", fullgraph=True)
    assert_identical(whole(*at(1.0)), model(*at(1.0)))
