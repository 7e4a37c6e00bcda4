"""Write tiny checkpoints with random weights: ``python checkpoints.py COMFYUI FOLDER``.

ComfyUI tells a model by its keys and shapes; these are the smallest that it takes for SD3 and Wan.
"""

import sys
from pathlib import Path


def main(comfyui: str, folder: str) -> None:
    sys.path.insert(0, comfyui)
    sys.argv = sys.argv[:1]
    import torch
    from comfy.cli_args import args

    args.cpu = True  # before the other modules look for a GPU
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
    from comfy.ldm.wan.model import WanModel
    from safetensors.torch import save_file

    made = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    text = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 256}}
    models = {
        "sd3": OpenAISignatureMMDITWrapper(
            pos_embed_max_size=16, patch_size=2, in_channels=16, depth=4, adm_in_channels=2048,
            context_embedder_config=text, **made,
        ),
        "wan": WanModel(
            dim=128, ffn_dim=256, num_heads=1, num_layers=4, text_dim=4096, in_dim=16, out_dim=16,
            **made,
        ),
    }  # fmt: skip
    for name, model in models.items():
        noise = torch.Generator().manual_seed(0)
        weights = {}
        for key, weight in model.state_dict().items():
            scale = 0.3 * weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.05
            weights[key] = scale * torch.randn(weight.shape, generator=noise)
        save_file(weights, Path(folder) / f"{name}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
