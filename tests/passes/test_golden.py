"""What is found in every model of the zoo, in files: a change of it is seen in review.

python tests/passes/test_golden.py        writes them anew
"""

import re
import sys
from pathlib import Path

import pytest
import torch
from zoo import ZOO, make

import fxcache

GOLDEN = Path(__file__).parent / "golden"


def shown(name: str) -> str:
    """`explain` without what another torch may call or round otherwise."""
    torch._dynamo.reset()
    model, inputs = make(name)
    with torch.no_grad():
        text = str(fxcache.explain(model, policy=fxcache.FirstBlockCache(), **inputs))
    text = re.sub(r"(probe|stream) +\w+( - \w+(, \w+)*)?", r"\1", text)
    return re.sub(r"audit  [\d.]+", "audit  #", text) + "\n"


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="FLOPs are counted otherwise")
@pytest.mark.parametrize("name", ZOO)
def test_what_is_found(name):
    pytest.importorskip("diffusers")
    assert shown(name) == (GOLDEN / f"{name}.txt").read_text()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in sys.argv[1:] or ZOO:
        (GOLDEN / f"{name}.txt").write_text(shown(name))
