"""Turns code indices into pictures, with torch, safetensors and the files config.json and model.safetensors beside it alone.

python decoder.py codes.safetensors pictures     # a PNG file for each grid in the tensor `indices`, as stage=extract has it
pictures = decoder.PictureDecoder()(indices)   # int64 (B, h, w), (B, h, w, num_codebooks) or (B, 1, L) -> (B, C, H, W) in [-1, 1]
"""

import json
import struct
import sys
import zlib
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


class PictureDecoder:
    """The layers that config.json lists under `decoder`, with their weights. h and w may be any numbers, L those of the scales."""

    def __init__(self, folder: str | Path = Path(__file__).parent, device: str = "cpu") -> None:
        facts = json.loads((Path(folder) / "config.json").read_text())
        self.layers, self.shown = facts["decoder"], [n - 1 for n in facts["shown"]]
        everything = load_file(Path(folder) / "model.safetensors", device)
        self.weights = {k: v for k, v in everything.items() if not k.startswith("encoder.")}

    @torch.no_grad()
    def __call__(self, indices: Tensor) -> Tensor:
        return self.run(self.layers, indices).clamp(-1, 1)

    def run(self, layers: list[dict[str, Any]], h: Tensor) -> Tensor:
        return reduce(self.apply, layers, h)

    def apply(self, h: Tensor, layer: dict[str, Any]) -> Tensor:
        weight, bias = (self.weights.get(layer.get(p, "")) for p in ("weight", "bias"))
        match layer:
            case {"kind": "choose", "codebook": i}:
                return h.reshape(*h.shape[:3], -1)[..., i]
            case {"kind": "cut", "first": first, "last": last, "size": size}:  # one scale
                return h[:, 0, first:last].unflatten(1, size)
            case {"kind": "look_up", "table": i}:
                return F.embedding(h, self.weights["codes"][i]).movedim(-1, 1)
            case {"kind": "conv", "padding": padding}:
                return F.conv2d(h, weight, bias, padding=padding)  # type: ignore[arg-type]
            case {"kind": "norm", "groups": groups, "eps": eps}:
                return F.group_norm(h, groups, weight, bias, eps)
            case {"kind": "silu" | "tanh" as kind}:
                return F.silu(h) if kind == "silu" else torch.tanh(h)
            case {"kind": "scale", "times": times, "plus": plus}:
                return h * times + plus
            case {"kind": "shuffle", "factor": factor}:
                return F.pixel_shuffle(h, factor)
            case {"kind": "enlarge", "to": to}:
                return F.interpolate(h, **to)
            case {"kind": "attend", "inputs": inputs}:  # one head over all positions
                q, k, v = (self.run([each], h).flatten(2).transpose(1, 2) for each in inputs)
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
            case {"kind": "add", "branches": branches}:
                return sum(self.run(branch, h) for branch in branches)  # type: ignore[return-value]
        raise ValueError(f"config.json has a layer that this decoder does not know: {layer}")


def encode_picture(picture: Tensor) -> bytes:
    """A picture (1 or 3, H, W) in [-1, 1] as the content of a PNG file."""
    pixels = ((picture + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).flatten(1).tolist()
    header = struct.pack(">2I5B", picture.shape[2], picture.shape[1], 8, len(picture) - 1, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(row) for row in pixels))
    chunks = (b"IHDR" + header, b"IDAT" + rows, b"IEND")
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


if __name__ == "__main__":
    decode, grids = PictureDecoder(), load_file(sys.argv[1])["indices"].long()
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(decode(grid[None])[0, decode.shown] for grid in grids):
        Path(sys.argv[2], f"{number:05}.png").write_bytes(encode_picture(picture))
