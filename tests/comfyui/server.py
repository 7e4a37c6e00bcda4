"""A real ComfyUI for the tests: booted once, asked over HTTP on loopback."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
#: The interpreter that ComfyUI runs on, and its folder.
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
PATH = os.environ.get("COMFYUI_PATH")


class PromptError(Exception):
    """What ComfyUI says of a workflow that failed: the node and the message."""


class Server:
    """ComfyUI on a folder of its own, with fxcache's nodes and those of the tests."""

    def __init__(self, base: Path) -> None:
        self.base = base
        for name in ("custom_nodes", "models/diffusion_models", "models/checkpoints", "input"):
            (base / name).mkdir(parents=True)
        shutil.copy(HERE / "tiny_nodes.py", base / "custom_nodes")
        run = [PYTHON, HERE / "checkpoints.py", PATH, base / "models/diffusion_models"]
        subprocess.run(run, check=True, capture_output=True, timeout=120)
        subprocess.run([PYTHON, "-m", "fxcache", "comfyui", base], check=True, timeout=60)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = base / "log.txt"
        flags = ["--cpu", "--use-pytorch-cross-attention", "--disable-auto-launch"]
        flags += ["--database-url", "sqlite:///:memory:", "--port", self.port]
        flags += ["--base-directory", base]
        command = [PYTHON, "main.py", *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two wait for each other for long
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=PATH, stdout=log, stderr=log, env=environment
            )
        for _ in range(240):
            try:
                self.info = self.get("object_info")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
                assert self.process.poll() is None, self.log.read_text()
        raise TimeoutError(self.log.read_text())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=30) as reply:
            return json.load(reply)

    def run(self, graph, seconds=180):
        """The outputs of a workflow by node. Raises PromptError if it was refused or failed."""
        body = json.dumps({"prompt": graph}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/prompt", body)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                name = json.load(reply)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptError(error.read().decode()) from error
        for _ in range(seconds * 20):
            history = self.get(f"history/{name}").get(name)
            if history is None:
                time.sleep(0.05)
                continue
            status = history["status"]
            if status["status_str"] != "success":
                raise PromptError(json.dumps(status["messages"][-1]))
            return history["outputs"]
        raise TimeoutError(self.log.read_text()[-2000:])

    def samples(self, graph, node="save", seconds=180):
        """The latent that a workflow saves."""
        (saved,) = self.run(graph, seconds)[node]["latents"]
        return load_file(self.base / "output" / saved["subfolder"] / saved["filename"])[
            "latent_tensor"
        ]


#: What `graph` can sample with, and its latents.
EMPTY = {
    "sd3": ("EmptySD3LatentImage", {"width": 64, "height": 64, "batch_size": 1}),
    "wan": ("EmptyHunyuanLatentVideo", {"width": 64, "height": 64, "length": 9, "batch_size": 1}),
}
_number = iter(range(10**6))


def graph(
    kind="sd3", nodes=(), *, sampler="KSampler", latent=None, positive=None, more=None, **given
):
    """A workflow: load, `nodes` (class and inputs) on the model one after the other, sample, save.

    Every workflow has a name of its own for what it saves, so that it is run and not remembered.
    """
    made = {
        "load": node("UNETLoader", unet_name=f"{kind}.safetensors", weight_dtype="default"),
        "positive": node("TinyText", seed=1, tokens=8),
        "negative": node("TinyText", seed=2, tokens=8),
        "latent": node(EMPTY[kind][0], **EMPTY[kind][1]),
    }
    model = ["load", 0]
    for number, (name, inputs) in enumerate(nodes):
        made[f"n{number}"] = node(name, model=model, **inputs)
        model = [f"n{number}", 0]
    settings = {
        "seed": 0, "steps": 8, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple",
        "denoise": 1.0, **given,
    }  # fmt: skip
    made["sample"] = node(
        sampler,
        model=model,
        positive=positive or ["positive", 0],
        negative=["negative", 0],
        latent_image=latent or ["latent", 0],
        **settings,
    )
    made |= more or {}
    prefix = f"latents/{next(_number)}"
    made["save"] = node("SaveLatent", samples=["sample", 0], filename_prefix=prefix)
    return made


def node(kind, /, **inputs):
    return {"class_type": kind, "inputs": inputs}


def same(a, b):
    return torch.equal(a, b)
