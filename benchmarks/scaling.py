"""Parameters, FLOPs and memory of both stages, counted from the models without a GPU; one JSON line per model.

python -m benchmarks.scaling --image-size 256 --grid 16 --sizes small base large

FLOPs are counted by torch.utils.flop_counter on tensors without storage: a multiplication and an addition are two. Those of
training are counted forward and backward, of one image (stage 1, without the discriminator) or one grid of codes (stage 2).
Activations are what autograd keeps for the backward pass, in bytes of float32, each tensor once; bf16 autocast keeps about half.
The state is what training holds per parameter: the weight, its gradient, two moments of AdamW and the average, 20 bytes.
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
from vqgan.tokenizer import Tokenizer

CONF = Path(__file__).parents[1] / "conf"
STATE = 20  # bytes a parameter: float32 weight, gradient, two moments, average


def counted(module: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Any]:
    """Parameters, GFLOPs forward and in all, and MiB of activations for the backward pass, of one training sample."""
    sizes: dict[int, int] = {}  # bytes of each storage that autograd keeps
    weights = {p.untyped_storage()._cdata for p in module.parameters()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(x)  # or a freed storage's address would be reused
        return x

    alive: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        FlopCounterMode(display=False) as flops,
    ):
        value = loss()
        forward = flops.get_total_flops()
        value.backward()
    parameters = sum(p.numel() for p in module.parameters())
    return {
        "parameters": parameters,
        "gflops_forward": round(forward / 1e9, 3),
        "gflops_training": round(flops.get_total_flops() / 1e9, 3),
        "activation_mib": round(sum(sizes.values()) / 2**20, 1),
        "state_gib": round(STATE * parameters / 2**30, 2),
    }


def config(*words: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(words))


def parse_options() -> argparse.Namespace:
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
    return parser.parse_args()


def print_row(model: str, sample: str, counts: dict[str, Any]) -> None:
    print(json.dumps({"model": model, "of": sample, **counts}))


def make_tokenizer(options: argparse.Namespace) -> Tokenizer:
    chosen = config(
        "stage=vqgan",
        "quantizer=vq",
        f"data.image_size={options.image_size}",
        f"model.grid={options.grid}",
        f"quantizer.K={options.K}",
        f"model.width={options.width}",
    )
    return build_tokenizer(chosen.model, chosen.quantizer)


def count_prior(options: argparse.Namespace, size: str, codebook: Tensor) -> dict[str, Any]:
    """The counts of one update of a prior on one grid of codes."""
    grid = options.grid
    codes = torch.randint(options.K, (1, grid * grid))
    label = torch.zeros(1, dtype=torch.int64)
    words = [] if size == "small" else [f"prior/size={size}"]
    prior = config("stage=prior", f"prior={options.prior}", *words).prior
    model = instantiate(prior, codebook=codebook, grid=(grid, grid), classes=options.classes)

    def learn() -> Tensor:
        prediction = model.learn(codes, label, 0.5)
        logits, targets = prediction.logits.flatten(0, 1), prediction.targets.flatten()
        return nn.functional.cross_entropy(logits, targets)

    return counted(model, learn)


def main() -> None:
    options = parse_options()
    tokenizer = make_tokenizer(options)
    x = torch.rand(1, 3, options.image_size, options.image_size) * 2 - 1

    def reconstruct() -> Tensor:
        q = tokenizer.encode(x)
        return (tokenizer.decode(q.z_q) - x).square().mean() + q.loss

    print_row(f"tokenizer, width {options.width}", "an image", counted(tokenizer, reconstruct))
    codebook: Tensor = tokenizer.code_space["codebook"]
    for size in options.sizes:
        sample = f"a grid of {options.grid**2} codes"
        print_row(f"{options.prior}, {size}", sample, count_prior(options, size, codebook))


if __name__ == "__main__":
    main()
