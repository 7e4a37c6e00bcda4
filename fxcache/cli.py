"""The command line: ``fxcache demo`` and ``fxcache explain``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fxcache.errors import FxCacheError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: something is missing or wrong)."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except FxCacheError as error:
        print(f"fxcache: {error}", file=sys.stderr)
    except ImportError as error:
        print(f'fxcache: {error}; try pip install "fxcache[demo]"', file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxcache", description="A compiler pass that makes diffusion models sample faster."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo", help="sample from a small trained model, uncached and cached, and compare"
    )
    demo.add_argument("--steps", type=_steps, default=30, help="sampler steps (default 30)")
    demo.add_argument(
        "--threshold", type=float, default=0.2, help="First Block Cache's (default 0.2)"
    )
    demo.add_argument(
        "--output", type=Path, default=Path("fxcache_demo"), help="folder for the pictures"
    )
    demo.add_argument("--seed", type=int, default=0, help="of the initial noise (default 0)")
    demo.add_argument(
        "--backend",
        default="eager",
        help='what compiles the pieces, e.g. "inductor" (default none)',
    )
    demo.set_defaults(run=_demo)

    explain = commands.add_parser("explain", help="print what the pass finds in a model")
    explain.add_argument(
        "--diffusers", metavar="CLASS", required=True, help="a denoiser class, built tiny"
    )
    explain.add_argument("--head-blocks", type=int, default=1, help="blocks that always run")
    explain.add_argument("--tail-blocks", type=int, default=0, help="the same at the stack's end")
    explain.set_defaults(run=_explain)
    return parser


def _steps(text: str) -> int:
    steps = int(text)
    if steps < 8:
        raise argparse.ArgumentTypeError("must be at least 8")
    return steps


def _demo(args: argparse.Namespace) -> int:
    from fxcache.demo.run import run_demo

    run_demo(
        steps=args.steps,
        threshold=args.threshold,
        seed=args.seed,
        output=args.output,
        backend=args.backend,
    )
    return 0


def _explain(args: argparse.Namespace) -> int:
    import fxcache
    from fxcache.integrations.tiny import tiny_model

    model, inputs = tiny_model(args.diffusers)
    policy = fxcache.FirstBlockCache(head_blocks=args.head_blocks, tail_blocks=args.tail_blocks)
    print(fxcache.explain(model, policy=policy, **inputs))
    return 0
