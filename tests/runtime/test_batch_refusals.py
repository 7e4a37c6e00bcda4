"""What cannot be a batch is refused, and changes nothing."""

import math

import pytest
import torch
from batches import decisions, of_net, together
from helpers import ALWAYS, assert_identical, plain
from nets import Net, Residual

from fxcache import AdaptiveCache, BatchError, FirstBlockCache, OptionError, PolicyError

ADAPTIVE = AdaptiveCache(tolerance=0.6)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize(
    ("requests", "rows", "message"),
    [
        (["a", "b", "a"], 1, "a name of its own"),
        (["a", None], 1, "a name of its own"),
        ([], 1, "one at least"),
        ({}, 1, "one at least"),
        ("ab", 1, "in a list"),
        (["a"], 0, "positive integer"),
        (["a"], True, "positive integer"),
        (["a", "b", "c"], 1, "has 3 rows"),
        (["a"], 2, "x has the shape (3, 16, 8)"),
    ],
)
def test_bad_requests_change_nothing(net, requests, rows, message):
    """Rows that do not divide, a name twice: an error, and the next call goes on."""
    denoiser = plain(net, ALWAYS, audit=False)
    together(denoiser, ["a", "b", "c"], *of_net(0, 3))
    x, t = of_net(1, 2 if message == "has 3 rows" else 3)
    with pytest.raises(OptionError, match=message.replace("(", r"\(").replace(")", r"\)")):
        together(denoiser, requests, x, t, rows_per_request=rows)
    together(denoiser, ["a", "b", "c"], *of_net(1, 3))
    assert [record.is_hit for record in denoiser.report().records] == [False] * 3 + [True] * 3


def test_a_policy_that_needs_other_pieces_is_refused(net):
    denoiser = plain(net, ADAPTIVE)
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
        (lambda: Net(Mixing), "read those of others"),
        (MixingTail, "read those of others"),
        (FirstTime, "row by row"),
        (FramesFirst, "read those of others"),
        (Asking, "is fixed in the model's graph"),
    ],
)
def test_models_whose_rows_are_not_apart_are_refused(model, message):
    """With equal rows, too, as a server warms up with; and they go on alone."""
    torch.manual_seed(0)
    policy = FirstBlockCache(threshold=math.inf)
    denoiser = plain(model().eval(), policy, audit=False)
    for x in (torch.zeros(2, 16, 8), torch.randn(2, 16, 8)):
        with pytest.raises(BatchError, match=message):
            together(denoiser, ["a", "b"], x, torch.ones(2))
    for step in range(2):
        with torch.no_grad(), denoiser.slot("a"):
            denoiser(*of_net(step, 1))
    assert [is_hit for is_hit, _ in decisions(denoiser, "a")] == [False, True]
    lenient = plain(model().eval(), policy, audit=False, fallback=True)
    with pytest.warns(UserWarning, match=message):
        together(lenient, ["a", "b"], *of_net(0))


def test_a_model_that_breaks_into_graphs_is_refused(net):
    class Broken(Net):
        def forward(self, x, t):
            torch._dynamo.graph_break()
            return super().forward(x, t)

    torch.manual_seed(0)
    denoiser = plain(Broken().eval(), ALWAYS, fullgraph=False, audit=False)
    with torch.no_grad():
        denoiser(*of_net(0, 1))
    with pytest.raises(BatchError, match="breaks into graphs"):
        together(denoiser, ["a", "b"], *of_net(0))


def test_with_gradients_nothing_is_cached(net):
    denoiser = plain(net, ALWAYS, audit=False)
    together(denoiser, ["a", "b"], *of_net(0))
    x, t = of_net(1)
    with torch.enable_grad(), denoiser.batch(["a", "b"]):
        assert_identical(denoiser(x, t), net(x, t))
    together(denoiser, ["a", "b"], *of_net(2))
    assert decisions(denoiser, "a")[-1] == (False, "after an uncached evaluation")
