"""Nodes that the tests' workflows need, for the `custom_nodes` of the ComfyUI that they boot."""

import comfy.controlnet
import comfy.model_management
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io


class TinyText(io.ComfyNode):
    """Random conditioning: no text encoder is there."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinyText",
            inputs=[io.Int.Input("seed"), io.Int.Input("tokens", default=8)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, seed, tokens=8):
        noise = torch.Generator().manual_seed(seed)
        text = torch.randn(1, tokens, 4096, generator=noise)
        pooled = torch.randn(1, 2048, generator=noise)
        return io.NodeOutput([[text, {"pooled_output": pooled}]])


class TinyStop(io.ComfyNode):
    """A model whose run ends at its `evaluation`-th evaluation, by an error or an interrupt."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinyStop",
            inputs=[
                io.Model.Input("model"),
                io.Int.Input("evaluation"),
                io.Boolean.Input("interrupts"),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, evaluation, interrupts):
        calls = []

        def stop(executor, *args, **kwargs):
            calls.append(None)
            if len(calls) == evaluation:
                if interrupts:
                    raise comfy.model_management.InterruptProcessingException
                raise RuntimeError("stopped by the test")
            return executor(*args, **kwargs)

        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "tiny", stop)
        return io.NodeOutput(clone)


class TinyUnbatched(io.ComfyNode):
    """A model whose conditions are evaluated one by one, each called the first."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinyUnbatched",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model):
        def each(args):
            x, given = args["input"], (args["sigma"], args["model_options"])
            one = comfy.samplers.calc_cond_batch
            return [one(args["model"], [c], x, *given)[0] for c in args["conds"]]

        clone = model.clone()
        clone.model_options["sampler_calc_cond_batch_function"] = each
        return io.NodeOutput(clone)


class TinyLora(io.ComfyNode):
    """A LoRA of rank 1 on every linear weight of the blocks."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinyLora",
            inputs=[io.Model.Input("model"), io.Float.Input("strength"), io.Int.Input("seed")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, strength, seed):
        noise, clone = torch.Generator().manual_seed(seed), model.clone()
        patches = {
            key: ("diff", (0.02 * torch.randn(weight.shape, generator=noise),))
            for key, weight in clone.model.state_dict().items()
            if "blocks" in key and weight.ndim == 2
        }
        assert clone.add_patches(patches, strength)
        return io.NodeOutput(clone)


class Control(comfy.controlnet.ControlBase):
    """The same residual for each of SD3's blocks, within its part of the run."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        if self.timestep_range and not self.timestep_range[1] <= t[0] <= self.timestep_range[0]:
            return None
        tokens = x_noisy.shape[-1] * x_noisy.shape[-2] // 4
        noise = torch.Generator().manual_seed(3)
        hint = 0.1 * torch.randn(1, tokens, 256, generator=noise)
        return {"output": [hint.expand(len(x_noisy), -1, -1)] * 4}

    def copy(self):
        other = Control()
        self.copy_to(other)
        return other


class TinyControl(io.ComfyNode):
    """Conditioning with a control until `end_percent`."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinyControl",
            inputs=[io.Conditioning.Input("conditioning"), io.Float.Input("end_percent")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning, end_percent):
        control = Control()
        control.set_cond_hint(torch.zeros(1, 3, 8, 8), 1.0, (0.0, end_percent))
        more = {"control": control, "control_apply_to_uncond": True}
        return io.NodeOutput([[text, {**rest, **more}] for text, rest in conditioning])


class TinyState(io.ComfyNode):
    """What is allocated and what stands in the model's place, behind a sampler."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinyState",
            inputs=[io.Model.Input("model"), io.Latent.Input("samples")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, samples):
        import gc

        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        held = sum(t.untyped_storage().nbytes() for t in tensors)
        there = type(model.model.diffusion_model)
        name = f"{there.__module__}.{there.__qualname__}"
        return io.NodeOutput(ui={"held": (held,), "model": (name,), "id": (id(there),)})


class TinyExtension(ComfyExtension):
    async def get_node_list(self):
        return [TinyText, TinyStop, TinyUnbatched, TinyLora, TinyControl, TinyState]


async def comfy_entrypoint():
    return TinyExtension()
