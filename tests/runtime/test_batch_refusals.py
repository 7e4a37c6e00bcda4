"""What cannot be a batch is refused, and changes nothing."""

import pytest
import torch
from batches import decisions, of_net, together
from comparing import assert_identical
from helpers import plain, seeded
from nets import Net, Residual
from policies import ALWAYS

from fxcache import AdaptiveCache, BatchError, OptionError, PolicyError

ADAPTIVE = AdaptiveCache(tolerance=0.6)


BAD = [
    (["a", "b", "a"], 1, "a name of its own"),
    (["a", None], 1, "a name of its own"),
    ([], 1, "one at least"),
    ({}, 1, "one at least"),
    ("ab", 1, "in a list"),
    (["a"], 0, "positive integer"),
    (["a"], True, "positive integer"),
    (["a", "b", "c"], 1, "has 3 rows"),
    (["a"], 2, r"x has the shape \(3, 16, 8\)"),
]


def net_of(cls=Net, block=Residual):
    return seeded(lambda: cls(block, depth=3))


def test_bad_requests_change_nothing():
    """Rows that do not divide, a name twice: an error, and the next call goes on. And so it is with
    gradients, in which nothing is cached.
    """
    net = net_of()
    denoiser, names = plain(net, ALWAYS, audit=False), ["a", "b", "c"]
    for requests, rows, message in BAD:
        denoiser.reset()
        together(denoiser, names, *of_net(0, 3))
        given = of_net(1, 2 if message == "has 3 rows" else 3)
        with pytest.raises(OptionError, match=message):
            together(denoiser, requests, *given, rows_per_request=rows)
        together(denoiser, names, *of_net(1, 3))
        made = [record.is_hit for record in denoiser.report().records]
        assert made == [False] * 3 + [True] * 3, message
    x, t = of_net(1)
    with torch.enable_grad(), denoiser.batch(["a", "b"]):
        assert_identical(denoiser(x, t), net(x, t))
    together(denoiser, ["a", "b"], *of_net(2))
    assert decisions(denoiser, "a")[-1] == (False, "after an uncached evaluation")


def test_a_policy_that_needs_other_pieces_is_refused():
    denoiser = plain(net_of(), ADAPTIVE)
    with pytest.raises(PolicyError, match="must be a policy"), denoiser.batch({"a": 0}):
        pass
    with pytest.raises(PolicyError, match="must have the span"), denoiser.batch({"a": ALWAYS}):
        pass


class Mixing(Residual):
    """Its rows read each other's."""

    def forward(self, x, t):
        return super().forward(x + 0.5 * x.mean(0, keepdim=True), t)


class MixingTail(Net):
    """So do those of its output, which is small beside its hidden states."""

    def forward(self, x, t):
        out = 0.01 * super().forward(x, t)
        return out - 0.5 * out.mean(0, keepdim=True)


class FirstTime(Net):
    """Has one time for all."""

    def forward(self, x, t):
        return super().forward(x, t[:1].expand(len(x)))


class FramesFirst(Net):
    """What crosses into its blocks has the rows inside."""

    def forward(self, x, t):
        shift = torch.sin(3 * t).repeat(16)
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, t) + shift.reshape(16, -1).T[:, :, None]
        return self.out(h)


class Asking(Net):
    """Asks for the number of rows."""

    def forward(self, x, t):
        return super().forward(x + torch.tensor([0.0] * len(x))[:, None, None], t)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ((Net, Mixing), "read those of others"),
        ((MixingTail,), "read those of others"),
        ((FirstTime,), "row by row"),
        ((FramesFirst,), "read those of others"),
        ((Asking,), "is fixed in the model's graph"),
    ],
)
def test_models_whose_rows_are_not_apart_are_refused(model, message):
    """With equal rows, too, as a server warms up with; and they go on alone."""
    denoiser = plain(net_of(*model), ALWAYS, audit=False)
    for x in (torch.zeros(2, 16, 8), torch.randn(2, 16, 8)):
        with pytest.raises(BatchError, match=message):
            together(denoiser, ["a", "b"], x, torch.ones(2))
    for step in range(2):
        with denoiser.slot("a"):
            denoiser(*of_net(step, 1))
    assert [is_hit for is_hit, _ in decisions(denoiser, "a")] == [False, True]


def test_where_fallback_is_wanted_it_goes_on_uncached():
    net = net_of(Asking)
    denoiser = plain(net, ALWAYS, audit=False, fallback=True)
    with pytest.warns(UserWarning, match="is fixed in the model's graph"):
        assert_identical(together(denoiser, ["a", "b"], *of_net(0)), net(*of_net(0)))


def test_a_model_that_breaks_into_graphs_is_refused():
    class Broken(Net):
        def forward(self, x, t):
            torch._dynamo.graph_break()
            return super().forward(x, t)

    denoiser = plain(net_of(Broken), ALWAYS, fullgraph=False, audit=False)
    denoiser(*of_net(0, 1))
    with pytest.raises(BatchError, match="breaks into graphs"):
        together(denoiser, ["a", "b"], *of_net(0))
