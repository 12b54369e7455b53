"""Counts the parameters, FLOPs and memory of the models of both stages, one JSON line each, without a GPU.

python -m benchmarks.scaling --image-size 256 --grid 16 --sizes small base large

FLOPs are counted by torch.utils.flop_counter; a multiplication and an addition are two. For training they include forward
and backward passes for one image (stage 1, without the discriminator) or one grid of codes (stage 2). Activations are the
tensors that autograd saves for the backward pass, each counted once, in float32; bf16 autocast saves about half as many bytes.
The state is what training stores per parameter: the weight, its gradient, two moments of AdamW and the average, 20 bytes.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.configs import compose_config
from vqgan.load import build_tokenizer

STATE_BYTES = 20  # per parameter: float32 weight, gradient, two moments, average


def count(module: nn.Module, compute_loss: Callable[[], Tensor]) -> dict[str, Any]:
    """Parameters, GFLOPs and activation memory in MiB of one training sample; `compute_loss` is its forward pass."""
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []

    def save(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
            alive.append(x)  # otherwise a new storage could get the address of a freed one
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda x: x),
        FlopCounterMode(display=False) as flops,
    ):
        loss = compute_loss()
        forward = flops.get_total_flops()
        loss.backward()
    parameters = sum(p.numel() for p in module.parameters())
    return {
        "parameters": parameters,
        "gflops_forward": round(forward / 1e9, 3),
        "gflops_training": round(flops.get_total_flops() / 1e9, 3),
        "activation_mib": round(sum(saved.values()) / 2**20, 1),
        "state_gib": round(STATE_BYTES * parameters / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--K", type=int, default=16384)
    parser.add_argument("--width", type=int, default=128, help="width of the tokenizer")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--prior", default="gpt")
    parser.add_argument("--sizes", nargs="+", default=["small", "base", "large"])
    options = parser.parse_args()
    grid = options.grid
    size = options.image_size
    words = [
        f"data.image_size={size}",
        f"model.grid={grid}",
        f"quantizer.K={options.K}",
        f"model.width={options.width}",
    ]
    config = compose_config("stage=vqgan", "quantizer=vq", *words)
    tokenizer = build_tokenizer(config.model, config.quantizer)
    x = torch.rand(1, 3, size, size) * 2 - 1

    def reconstruct() -> Tensor:
        q = tokenizer.encode(x)
        return (tokenizer.decode(q.z_q) - x).square().mean() + q.loss

    about = {"model": f"tokenizer, width {options.width}", "of": "an image"}
    print(json.dumps({**about, **count(tokenizer, reconstruct)}), flush=True)
    codebook: Tensor = tokenizer.code_space["codebook"]
    codes = torch.randint(options.K, (1, grid * grid))
    for name in options.sizes:
        size_words = [] if name == "small" else [f"prior/size={name}"]
        settings = compose_config("stage=prior", f"prior={options.prior}", *size_words).prior
        model = instantiate(settings, codebook=codebook, grid=(grid, grid), classes=options.classes)
        label = torch.zeros(1, dtype=torch.int64)

        def learn(model: Any = model, label: Tensor = label) -> Tensor:
            prediction = model.learn(codes, label, 0.5)
            return nn.functional.cross_entropy(
                prediction.logits.flatten(0, 1), prediction.targets.flatten()
            )

        about = {"model": f"{options.prior}, {name}", "of": f"a grid of {grid * grid} codes"}
        print(json.dumps({**about, **count(model, learn)}), flush=True)


if __name__ == "__main__":
    main()
