"""What a run takes by the models themselves: parameters, FLOPs and memory of both stages, a JSON line each, without a GPU.

python -m benchmarks.scaling --image-size 256 --grid 16 --sizes small base large

FLOPs are counted by torch.utils.flop_counter on tensors without storage: a multiplication and an addition are two. Those of
training are counted forward and backward, of one image (stage 1, without the discriminator) or one grid of codes (stage 2).
Activations are what autograd keeps for the way back, in bytes of float32, each tensor once; bf16 autocast keeps about half.
The state is what training holds a parameter: the weight, its gradient, two moments of AdamW and the average, 20 bytes.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vqgan.load import build_tokenizer

CONF = Path(__file__).parents[1] / "conf"
STATE = 20  # bytes a parameter: float32 weight, gradient, two moments, average


def counted(module: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Any]:
    """Parameters, GFLOPs forward and in all, and MiB of what is kept for the way back, of one training sample."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage()._cdata for p in module.parameters()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(x)  # or the number of a storage that is gone would be another's
        return x

    alive: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        FlopCounterMode(display=False) as flops,
    ):
        found = loss()
        forward = flops.get_total_flops()
        found.backward()
    parameters = sum(p.numel() for p in module.parameters())
    return {
        "parameters": parameters,
        "gflops_forward": round(forward / 1e9, 3),
        "gflops_training": round(flops.get_total_flops() / 1e9, 3),
        "activation_mib": round(sum(kept.values()) / 2**20, 1),
        "state_gib": round(STATE * parameters / 2**30, 2),
    }


def config(*words: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(words))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--K", type=int, default=16384)
    parser.add_argument("--width", type=int, default=128, help="of the tokenizer")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--prior", default="gpt")
    parser.add_argument("--sizes", nargs="+", default=["small", "base", "large"])
    given = parser.parse_args()
    grid, size = given.grid, given.image_size
    words = [
        f"data.image_size={size}",
        f"model.grid={grid}",
        f"quantizer.K={given.K}",
        f"model.width={given.width}",
    ]
    chosen = config("stage=vqgan", "quantizer=vq", *words)
    tokenizer = build_tokenizer(chosen.model, chosen.quantizer)
    x = torch.rand(1, 3, size, size) * 2 - 1

    def reconstruct() -> Tensor:
        q = tokenizer.encode(x)
        return (tokenizer.decode(q.z_q) - x).square().mean() + q.loss

    print(
        json.dumps(
            {
                "model": f"tokenizer, width {given.width}",
                "of": "an image",
                **counted(tokenizer, reconstruct),
            }
        )
    )
    codebook, codes = (
        tokenizer.quantizer.codebooks().detach(),
        torch.randint(given.K, (1, grid * grid)),
    )
    for name in given.sizes:
        chosen = config(
            "stage=prior",
            f"prior={given.prior}",
            *([] if name == "small" else [f"prior/size={name}"]),
        ).prior
        model = instantiate(chosen, codebook=codebook, grid=(grid, grid), classes=given.classes)
        label = torch.zeros(1, dtype=torch.int64)

        def learn(model: Any = model, label: Tensor = label) -> Tensor:
            prediction = model.learn(codes, label, 0.5)
            return nn.functional.cross_entropy(
                prediction.logits.flatten(0, 1), prediction.targets.flatten()
            )

        print(
            json.dumps(
                {
                    "model": f"{given.prior}, {name}",
                    "of": f"a grid of {grid * grid} codes",
                    **counted(model, learn),
                }
            )
        )


if __name__ == "__main__":
    main()
