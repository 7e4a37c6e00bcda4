"""Which tensors of a graph hold a batch's rows, and along which dimension: told by symbol.

The number of rows is a symbol of the capture. A size that is a multiple of it holds rows, whatever
number it happens to be; all of a row lie together (``[rows * frames, ...]``).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcache.errors import BatchError
from fxcache.passes.facts import Facts
from fxcache.passes.graph import tensor_of


@dataclass(frozen=True)
class Rows:
    """The number of rows (a symbol), and how many of them a request has."""

    symbol: Any
    per_request: int

    @classmethod
    def of(cls, facts: Facts, per_request: int) -> "Rows":
        """Those of the noisy sample. Raises BatchError if their number is fixed in the graph."""
        sample = facts.samples[0]
        size = (*tensor_of(sample).shape, 0)[0]
        if isinstance(size, int) or not size.node.expr.is_Symbol:
            raise BatchError(
                f"the number of rows of {facts.inputs.paths[sample]} is fixed in the model's graph "
                f"({size}): its code asks for it, or rows meet a tensor that does not have them "
                f"first. Requests of it cannot be batched"
            )
        return cls(size.node.expr, per_request)

    def dimension(self, tensor: torch.Tensor) -> int | None:
        """The dimension that holds the rows of `tensor`, a fake (None: it has none).

        Raises BatchError if that cannot be told.
        """
        own = [(d, _formula(size)) for d, size in enumerate(tensor.shape)]
        held = [(d, size) for d, size in own if self.symbol in getattr(size, "free_symbols", ())]
        if not held:
            return None
        if len(held) > 1 or self.symbol in (held[0][1] / self.symbol).free_symbols:
            raise BatchError(
                f"a tensor of the sizes {tuple(tensor.shape)} cannot be divided into the batch's "
                f"{self.symbol} rows: requests of this model cannot be batched"
            )
        return held[0][0]

    def leading(self, node: fx.Node) -> int:
        """So many elements of the first dimension of `node` are one request's.

        Raises BatchError if its rows are not there.
        """
        size = (*tensor_of(node).shape, 0)[0]
        if self.dimension(tensor_of(node)) != 0 or not (_formula(size) / self.symbol).is_Integer:
            raise BatchError(
                f"what the policy measures ({node}, of the sizes {tuple(tensor_of(node).shape)}) "
                f"does not have the batch's {self.symbol} rows first: requests cannot be batched "
                f"with it"
            )
        return self.per_request * int(_formula(size) / self.symbol)


def _formula(size: int | torch.SymInt) -> Any:
    return size if isinstance(size, int) else size.node.expr
