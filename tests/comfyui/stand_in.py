"""Stand-ins for the handful of ComfyUI's interfaces that the pack touches.

`test_contract` holds them against a real ComfyUI where there is one.
"""

import copy
import itertools
import sys
import types
from types import SimpleNamespace

import torch
from torch import nn


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"


def add_wrapper_with_key(call_type, key, wrapper, transformer_options, is_model_options=False):
    options = transformer_options
    if is_model_options:
        options = options.setdefault("transformer_options", {})
    options.setdefault("wrappers", {}).setdefault(call_type, {}).setdefault(key, []).append(wrapper)


def get_all_wrappers(call_type, transformer_options, is_model_options=False):
    options = transformer_options
    if is_model_options:
        options = options.get("transformer_options", {})
    return [w for own in options.get("wrappers", {}).get(call_type, {}).values() for w in own]


class WrapperExecutor:
    """Calls a function through its wrappers, the first outermost."""

    def __init__(self, original, class_obj, wrappers, idx=0):
        self.original, self.class_obj, self.wrappers, self.idx = original, class_obj, wrappers, idx

    new_class_executor = classmethod(lambda cls, *args: cls(*args))

    def execute(self, *args, **kwargs):
        if self.idx == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.idx](self, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        inner = WrapperExecutor(self.original, self.class_obj, self.wrappers, self.idx + 1)
        return inner.execute(*args, **kwargs)


def create_model_options_clone(orig_model_options):
    return copy.deepcopy(orig_model_options)


class ModelPatcher:
    def __init__(self, model):
        self.model, self.wrappers, self.model_options = model, {}, {"transformer_options": {}}

    def clone(self):
        other = ModelPatcher(self.model)
        other.wrappers = copy.deepcopy(self.wrappers)
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def add_wrapper_with_key(self, wrapper_type, key, wrapper):
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, wrapper_type, key):
        self.wrappers.get(wrapper_type, {}).pop(key, None)


class Sampling:
    """Flow matching: the noise level falls from 1 to 0."""

    def percent_to_sigma(self, percent):
        return 1.0 - percent


class BaseModel(nn.Module):
    def __init__(self, diffusion_model, model_config):
        super().__init__()
        self.diffusion_model, self.model_config = diffusion_model, model_config
        self.model_sampling = Sampling()

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None,
                    transformer_options={}):  # noqa: B006  # fmt: skip
        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._apply_model, self, wrappers)
        return executor.execute(x, t, c_concat, c_crossattn, control, transformer_options)

    def _apply_model(self, x, t, c_concat, c_crossattn, control, transformer_options):
        return self.diffusion_model(x, t, c_crossattn, transformer_options=transformer_options)


class Guider:
    """ComfyUI's guider with an Euler sampler; `second` evaluates twice a step, as Heun does."""

    def __init__(self, patcher, *, second=False, batched=True, cfg=2.0):
        self.model_patcher, self.model_options = patcher, patcher.model_options
        self.second, self.batched, self.cfg = second, batched, cfg

    def sample(self, noise, sigmas, conds):
        given = self.model_options
        self.model_options = create_model_options_clone(given)
        self.model_options["transformer_options"]["wrappers"] = copy.copy(
            self.model_patcher.wrappers
        )
        wrappers = get_all_wrappers(WrappersMP.OUTER_SAMPLE, self.model_options, True)
        executor = WrapperExecutor.new_class_executor(self.outer_sample, self, wrappers)
        self.conds = conds
        try:
            return executor.execute(noise, None, None, sigmas)
        finally:
            self.model_options = given

    def outer_sample(self, noise, latent_image, sampler, sigmas):
        x = noise
        for sigma, after in itertools.pairwise(sigmas):
            slope = self.guided(x, sigma)
            moved = x + (after - sigma) * slope
            if self.second and after > 0:
                moved = x + (after - sigma) * (slope + self.guided(moved, after)) / 2
            x = moved
        return x

    def guided(self, x, sigma):
        groups = [[1, 0]] if self.batched else [[0], [1]]
        found = {}
        for group in groups:
            options = dict(self.model_options["transformer_options"])
            options |= {"cond_or_uncond": group, "sigmas": sigma[None], "uuids": [object()]}
            text = torch.cat([self.conds[i] for i in group])
            xs, ts = torch.cat([x] * len(group)), sigma.expand(len(group))
            out = self.model_patcher.model.apply_model(
                xs, ts, c_crossattn=text, transformer_options=options
            )
            found |= dict(zip(group, out.chunk(len(group)), strict=True))
        return found[1] + self.cfg * (found[0] - found[1])


class Record:
    """An input or an output of a node, as it was described."""

    def __init__(self, name=None, **described):
        self.name, self.described = name, described


class NodeOutput:
    def __init__(self, *args, ui=None):
        self.args, self.ui = args, ui


class Kinds:
    """`comfy_api.latest.io`: every kind of input is a `Record`."""

    ComfyNode = object
    Schema = SimpleNamespace
    NodeOutput = NodeOutput

    def __getattr__(self, name):
        return SimpleNamespace(Input=Record, Output=Record)


def set_torch_compile_wrapper(
    model, backend, options=None, mode=None, fullgraph=False, dynamic=None
):
    model.model_options["torch_compile_kwargs"] = {
        "backend": backend, "options": options, "mode": mode, "fullgraph": fullgraph,
        "dynamic": dynamic,
    }  # fmt: skip


#: The modules, and what the pack takes of each.
MODULES = {
    "comfy.patcher_extension": {
        "WrappersMP": WrappersMP, "add_wrapper_with_key": add_wrapper_with_key,
    },
    "comfy.model_patcher": {
        "create_model_options_clone": create_model_options_clone, "ModelPatcher": ModelPatcher,
    },
    "comfy.samplers": {"KSampler": SimpleNamespace(SAMPLERS=["euler"], SCHEDULERS=["simple"])},
    "comfy.sample": {"sample": None, "prepare_noise": None, "fix_empty_latent_channels": None},
    "comfy.utils": {"ProgressBar": None},
    "comfy_api.latest": {
        "io": Kinds(), "ui": SimpleNamespace(PreviewText=str), "ComfyExtension": object,
    },
    "comfy_api.torch_helpers": {"set_torch_compile_wrapper": set_torch_compile_wrapper},
    "folder_paths": {"get_output_directory": None},
    "nodes": {"common_ksampler": None},
}  # fmt: skip


def put(monkeypatch):
    """Put the stand-ins where ComfyUI's modules would be."""
    for name, members in MODULES.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            package = sys.modules.setdefault(parent, types.ModuleType(parent))
            monkeypatch.setitem(sys.modules, parent, package)
            monkeypatch.setattr(package, child, module, raising=False)
