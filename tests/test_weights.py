"""Changed weights are noticed, moved and merely used ones are no change: the stamps by themselves.

In denoisers: tests/test_training.py.
"""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from fxcache.runtime import weights as room
from fxcache.runtime.weights import Weights


def parameters(count=3):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(4, 4, generator=generator)) for _ in range(count)]


def graph(count, *, order=None, registered=None, numbers=None, constants=None):
    """The weights of a graph that reads `count` tensors of its inputs."""
    places = list(range(count)) if order is None else order
    return Weights(
        places, registered or [True] * len(places), numbers or {}, lambda: constants or {}
    )


def stepped(optimizer, given, **options):
    with torch.enable_grad():
        sum(p.square().sum() for p in given).backward()
    optimizer(given, lr=0.1, **options).step()


def moving_average(given):
    average = pytest.importorskip("diffusers.training_utils").EMAModel(given)
    average.shadow_params = [p + 1 for p in average.shadow_params]
    average.copy_to(given)


def assign(given, place=0):
    given[place] = nn.Parameter(given[place].detach().clone())


def set_data(given):
    given[1].data = given[1].data + 1


CHANGES = {
    "SGD": lambda given: stepped(torch.optim.SGD, given),
    "AdamW, one by one": lambda given: stepped(torch.optim.AdamW, given, foreach=False),
    "AdamW, foreach": lambda given: stepped(torch.optim.AdamW, given, foreach=True),
    "AdamW, fused": lambda given: stepped(torch.optim.AdamW, given, fused=True),
    "copy_": lambda given: given[0].copy_(torch.zeros(4, 4)),
    "one row": lambda given: given[2][3].zero_(),
    "lerp": lambda given: torch._foreach_lerp_(given, [torch.zeros(4, 4)] * 3, 0.1),
    "data, in place": lambda given: given[2].data.add_(1),
    "data, replaced": set_data,
    "a moving average of diffusers": moving_average,
    "another parameter of equal values": assign,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_weights(change):
    given = parameters()
    weights = graph(3)
    stamp = weights.stamp(given)
    assert weights.unchanged(stamp, given) is stamp
    change(given)
    assert weights.unchanged(stamp, given) is None
    stamp = weights.stamp(given)
    assert weights.unchanged(stamp, given) is stamp


def move(given):
    for parameter in given:
        parameter.data = parameter.data.clone()


def train_another(given):
    stepped(torch.optim.AdamW, parameters(), fused=True)


def use(given):
    with torch.enable_grad():
        sum(p.square().sum() for p in given).backward()
    for parameter in given:
        parameter.grad = None
        parameter.requires_grad_(False)
        parameter.requires_grad_(True)


@pytest.mark.parametrize("keep", [move, train_another, use])
def test_what_does_not_change_weights(keep):
    given = parameters()
    weights = graph(3)
    stamp = weights.stamp(given)
    for _ in range(2):
        keep(given)
        assert weights.unchanged(stamp, given) is stamp
    given[1].data.add_(1)  # where it lies now is known
    assert weights.unchanged(stamp, given) is None


def test_a_fused_step_is_noticed_by_the_step_itself(monkeypatch):
    """torch does not count what its fused optimizers write, and a GPU's memory is not looked at."""
    monkeypatch.setattr(room, "_is_on_host", lambda tensor: False)
    given = parameters()
    weights = graph(3)
    stamp = weights.stamp(given)
    stepped(torch.optim.AdamW, given[2:], fused=True)
    assert weights.unchanged(stamp, given) is None


def test_off_the_host_all_weights_must_move_and_hold_what_they_held(monkeypatch):
    monkeypatch.setattr(room, "_is_on_host", lambda tensor: False)
    given = parameters(40)
    weights = graph(40)
    stamp = weights.stamp(given)
    move(given)
    assert weights.unchanged(stamp, given) is stamp
    given[7].data = given[7].data.clone()
    assert weights.unchanged(stamp, given) is None
    stamp = weights.stamp(given)
    for parameter in given:
        parameter.data = parameter.data + 1
    assert weights.unchanged(stamp, given) is None


@pytest.mark.parametrize("place", [0, 577, 1199])
def test_one_of_many_weights_is_enough(place):
    given = parameters(1200)
    weights = graph(1200)
    stamp = weights.stamp(given)
    assert weights.unchanged(stamp, given) is stamp
    given[place].data += 1e-3  # an adapter merged into one layer
    assert weights.unchanged(stamp, given) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8, torch.complex128])
def test_any_dtype(dtype):
    given = [torch.ones(2, dtype=dtype), torch.zeros(0, dtype=dtype)]
    weights = graph(2)
    stamp = weights.stamp(given)
    assert weights.unchanged(stamp, given) is stamp
    given[0].data.mul_(2)
    assert weights.unchanged(stamp, given) is None


@pytest.mark.parametrize("changed", [0, 3])
def test_a_change_that_rounds_to_none_in_the_first_element(changed):
    given = [torch.ones(4, dtype=torch.bfloat16), torch.ones(4, 2, dtype=torch.bfloat16).T]
    weights = graph(2)
    stamp = weights.stamp(given)
    given[0].data[changed] += 0.01
    assert weights.unchanged(stamp, given) is None


def test_inference_tensors_have_no_count_of_writes():
    with torch.inference_mode():
        given = [torch.ones(3), torch.ones(3)]
    given[1] = nn.Parameter(torch.ones(3))
    weights = graph(2)
    stamp = weights.stamp(given)
    assert weights.unchanged(stamp, given) is stamp
    with torch.inference_mode():
        given[0].add_(1)
    assert weights.unchanged(stamp, given) is None
    stamp = weights.stamp(given)
    given[1].add_(1)
    assert weights.unchanged(stamp, given) is None


def test_weights_that_wrap_others():
    given = [TwoTensor(torch.ones(3), torch.ones(3)), nn.Parameter(torch.ones(3))]
    weights = graph(2)
    stamp = weights.stamp(given)
    assert weights.unchanged(stamp, given) is stamp
    given[0].b.add_(1)
    assert weights.unchanged(stamp, given) is None


def test_a_stamp_keeps_no_weight_alive_and_knows_when_one_is_gone():
    given = parameters()
    alive, weights = weakref.ref(given[1]), graph(3)
    stamp = weights.stamp(given)
    given[1] = given[1].detach().clone()
    gc.collect()
    assert alive() is None
    assert weights.unchanged(stamp, given) is None
    assert graph(3).unchanged(stamp, given) is None


# --- two graphs of one state ---


def test_another_graph_of_the_same_weights():
    """Recompiled for another mode or other arguments."""
    given = parameters()
    stamp = graph(3).stamp(given)
    other = graph(3, order=[2, 0, 1])
    own = other.unchanged(stamp, given)
    assert own is not None
    assert own is not stamp
    assert own.weights is other
    given[0].data.add_(1)
    assert other.unchanged(own, given) is None
    assert graph(3).unchanged(stamp, given) is None


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 3], [0, 1, 2, 3]])
def test_a_graph_of_other_weights(order):
    """An adapter came, went, or is another one."""
    given = parameters(4)
    stamp = graph(3).stamp(given)
    assert graph(4, order=order).unchanged(stamp, given) is None


def test_tables_that_are_computed_at_the_first_call():
    given = [*parameters(), torch.ones(3)]
    stamp = graph(3).stamp(given)
    other = graph(4, registered=[True] * 3 + [False])
    own = other.unchanged(stamp, given)
    assert own is not None
    assert graph(3).unchanged(own, given) is not None
    given[3] = torch.ones(3)
    assert other.unchanged(own, given) is None


def test_constants_of_the_model():
    given = parameters()
    stamp = graph(3, constants={"scale": ("scale == 1.0",), "a": ("a == 1",)}).stamp(given)
    same = {"scale": ("scale == 1.0",), "b": ("b == 2",)}
    assert graph(3, constants=same).unchanged(stamp, given) is not None
    assert graph(3, constants={"scale": ("scale == 0.5",)}).unchanged(stamp, given) is None


def test_numbers_of_the_model():
    given = [*parameters(), torch.tensor(1.0)]
    weights = graph(3, numbers={"scale": 3})
    stamp = weights.stamp(given)
    given[3] = torch.tensor(1.0)  # made anew for each call
    assert weights.unchanged(stamp, given) is stamp
    assert graph(3, numbers={"scale": 3}).unchanged(stamp, given) is not None
    assert graph(3, constants={"scale": ("scale == 2.0",)}).unchanged(stamp, given) is None
    given[3] = torch.tensor(0.5)
    assert weights.unchanged(stamp, given) is None
    assert graph(3, numbers={"scale": 3}).unchanged(stamp, given) is None
