"""The command line: ``fxcache demo``, ``explain``, ``calibrate``, ``tune`` and ``comfyui``."""

import argparse
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fxcache
from fxcache.comfyui import install
from fxcache.errors import FxCacheError, OptionError
from fxcache.pipelines.tiny import tiny_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: something is missing or wrong)."""
    options = vars(_parser().parse_args(arguments))
    run = options.pop("run")
    try:
        run(**options)
    except FxCacheError as error:
        print(f"fxcache: {error}", file=sys.stderr)
    except ImportError as error:
        print(f'fxcache: {error}; try pip install "fxcache[demo]"', file=sys.stderr)
    else:
        return 0
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
    demo.add_argument("--threshold", type=float, default=0.2, help="First Block Cache's (0.2)")
    demo.add_argument("--output", type=Path, default=Path("fxcache_demo"), help="its folder")
    demo.add_argument("--seed", type=int, default=0, help="of the initial noise (default 0)")
    demo.add_argument("--backend", default="eager", help='compiles the pieces, e.g. "inductor"')
    demo.set_defaults(run=_demo)

    explain = commands.add_parser("explain", help="print what the pass finds in a model")
    explain.add_argument(
        "--diffusers", metavar="CLASS", required=True, help="a denoiser class, built tiny"
    )
    explain.add_argument("--head-blocks", type=int, default=1, help="blocks that always run")
    explain.add_argument("--tail-blocks", type=int, default=0, help="the same at the stack's end")
    explain.set_defaults(run=_explain)

    calibrate = commands.add_parser(
        "calibrate", help="record uncached sampling runs and write the tables of a policy"
    )
    _add_target(calibrate)
    calibrate.add_argument(
        "--policy", default="MagCache", choices=["MagCache", "TeaCache"], help="(default MagCache)"
    )
    calibrate.add_argument("--runs", type=int, default=2, help="how often to sample (default 2)")
    calibrate.add_argument(
        "--output", type=Path, default=Path("profile.safetensors"), help="where the profile goes"
    )
    calibrate.set_defaults(run=_calibrate)

    tune = commands.add_parser(
        "tune", help="find the best schedule for a speed or a quality, and verify it"
    )
    _add_target(tune)
    goal = tune.add_mutually_exclusive_group(required=True)
    goal.add_argument("--target-speedup", type=float, help="uncached FLOPs over cached FLOPs")
    goal.add_argument("--max-computed-steps", type=int, help="of a trajectory, at most")
    goal.add_argument("--min-psnr", type=float, help="in dB, over the tested seeds")
    goal.add_argument("--tolerance", type=float, help="try AdaptiveCache with it")
    tune.add_argument("--runs", type=int, default=1, help="recorded uncached runs (default 1)")
    tune.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    tune.add_argument("--verify-runs", type=int, default=2, help="verifying runs (default 2)")
    tune.add_argument(
        "--output", type=Path, default=Path("schedule.json"), help="where the schedule goes"
    )
    tune.add_argument("--plot", type=Path, help="draw quality over speedup into this file")
    tune.set_defaults(run=_tune)

    comfyui = commands.add_parser("comfyui", help="put the nodes into a ComfyUI, or take them out")
    comfyui.add_argument("path", type=Path, help="the folder that holds custom_nodes")
    comfyui.add_argument("--remove", action="store_true", help="take them out")
    comfyui.set_defaults(run=_comfyui)
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="FILE.py:FUNCTION",
        help='a function that returns (denoiser or pipeline, run); or "demo", the demo\'s sampler',
    )


def _steps(text: str) -> int:
    steps = int(text)
    if steps < 8:
        raise argparse.ArgumentTypeError("must be at least 8")
    return steps


def _demonstration(name: str) -> Any:
    """A function of the demo, which needs more packages than the library does."""
    return pkgutil.resolve_name(f"fxcache.demo.{name}")


def _demo(**options: Any) -> None:
    _demonstration("run:run_demo")(**options)


def _explain(diffusers: str, head_blocks: int, tail_blocks: int) -> None:
    model, inputs = tiny_model(diffusers)
    policy = fxcache.FirstBlockCache(head_blocks=head_blocks, tail_blocks=tail_blocks)
    print(fxcache.explain(model, policy=policy, **inputs))


def _calibrate(target: str, policy: str, runs: int, output: Path) -> None:
    _check_output(output)
    profile = fxcache.calibrate(*_load_target(target), getattr(fxcache, policy), runs=runs)
    print(profile)
    print(f"written to {profile.save(output)}")


def _tune(target: str, output: Path, plot: Path | None, **options: Any) -> None:
    for path in filter(None, (output, plot)):
        _check_output(path)
    result = fxcache.tune(*_load_target(target), **options)
    print(result)
    if options["tolerance"] is None:
        print(f"written to {result.save(output)}")
    if plot is not None:
        print(f"drawn into {result.plot(plot)}")


def _comfyui(path: Path, remove: bool) -> None:
    print(install.remove(path) if remove else install.install(path))


def _check_output(path: Path) -> None:
    """Raise OptionError if nothing can be written to `path`: before hours of sampling."""
    if not path.parent.is_dir() or path.is_dir():
        raise OptionError(f"{path} must be a file in a folder that is there")


def _load_target(text: str) -> tuple[Any, Any]:
    """What to sample with: the demo's sampler, or what a function in a file returns."""
    if text == "demo":
        target: tuple[Any, Any] = _demonstration("sampler:sampling_target")()
        return target
    path, _, name = text.rpartition(":")
    if not path or not Path(path).is_file():
        raise OptionError(f"target must be FILE.py:FUNCTION or demo, got {text!r}")
    sys.path.insert(0, str(Path(path).resolve().parent))  # as for a script
    try:
        function = runpy.run_path(path).get(name)
        if not callable(function):
            raise OptionError(f"{path} must define a function {name!r}")
        pair = function()
    except FxCacheError:
        raise
    except Exception as error:
        raise OptionError(f"{text} raised {type(error).__name__}: {error}") from error
    finally:
        del sys.path[0]
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise OptionError(
            f"{text} must return (denoiser or pipeline, run), got a {type(pair).__name__}"
        )
    return pair
