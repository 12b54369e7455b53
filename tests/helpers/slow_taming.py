"""The networks of taming-transformers, latent diffusion and open-muse once more, from their names and in plain arithmetic.

Nothing of vqgan/ is used, so that a mistake there shows: weights are looked up by their public names while the maps run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """What a config of these programs says."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[int, ...]  # levels
    z_channels: int
    embed_dim: int
    n_embed: int
    channels: int = 3
    attn_type: str = "vanilla"
    resamp_with_conv: bool = True
    tanh_out: bool = False

    def ddconfig(self, resolution: int) -> dict[str, Any]:
        return {
            "ch": self.ch,
            "ch_mult": list(self.ch_mult),
            "num_res_blocks": self.num_res_blocks,
            "attn_resolutions": [resolution >> level for level in self.attention],
            "z_channels": self.z_channels,
            "in_channels": self.channels,
            "out_ch": self.channels,
            "resolution": resolution,
            "double_z": False,
            "attn_type": self.attn_type,
            "resamp_with_conv": self.resamp_with_conv,
            "tanh_out": self.tanh_out,
        }


def list_shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    """All weights of a tokenizer with one codebook."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add_conv(name: str, out: int, into: int, side: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, into, side, side)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def add_norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def add_block(name: str, into: int, out: int) -> None:
        add_norm(f"{name}.norm1", into)
        add_conv(f"{name}.conv1", out, into, 3)
        add_norm(f"{name}.norm2", out)
        add_conv(f"{name}.conv2", out, out, 3)
        if into != out:
            add_conv(f"{name}.nin_shortcut", out, into, 1)

    def add_attention(name: str, width: int) -> None:
        if s.attn_type == "linear":
            add_conv(f"{name}.to_qkv", 3 * width, width, 1, bias=False)
            add_conv(f"{name}.to_out", width, width, 1)
        elif s.attn_type == "vanilla":
            add_norm(f"{name}.norm", width)
            for part in ("q", "k", "v", "proj_out"):
                add_conv(f"{name}.{part}", width, width, 1)

    def add_middle(side: str, width: int) -> None:
        add_block(f"{side}.mid.block_1", width, width)
        add_attention(f"{side}.mid.attn_1", width)
        add_block(f"{side}.mid.block_2", width, width)

    widths, last = [s.ch * mult for mult in s.ch_mult], len(s.ch_mult) - 1
    add_conv("encoder.conv_in", s.ch, s.channels, 3)
    width = s.ch
    for i, out in enumerate(widths):
        for j in range(s.num_res_blocks):
            add_block(f"encoder.down.{i}.block.{j}", width, out)
            width = out
            if i in s.attention:
                add_attention(f"encoder.down.{i}.attn.{j}", width)
        if i < last and s.resamp_with_conv:
            add_conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    add_middle("encoder", width)
    add_norm("encoder.norm_out", width)
    add_conv("encoder.conv_out", s.z_channels, width, 3)
    add_conv("quant_conv", s.embed_dim, s.z_channels, 1)
    shapes["quantize.embedding.weight"] = (s.n_embed, s.embed_dim)
    add_conv("post_quant_conv", s.z_channels, s.embed_dim, 1)
    add_conv("decoder.conv_in", width, s.z_channels, 3)
    add_middle("decoder", width)
    for i in range(last, -1, -1):
        for j in range(s.num_res_blocks + 1):
            add_block(f"decoder.up.{i}.block.{j}", width, widths[i])
            width = widths[i]
            if i in s.attention:
                add_attention(f"decoder.up.{i}.attn.{j}", width)
        if i and s.resamp_with_conv:
            add_conv(f"decoder.up.{i}.upsample.conv", width, width, 3)
    add_norm("decoder.norm_out", width)
    add_conv("decoder.conv_out", s.channels, width, 3)
    return shapes


def draw_weights(s: Sizes, seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep maps at about unit variance."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in list_shapes(s).items():
        value = torch.randn(shape, generator=generator)
        if ".norm" in name and name.endswith(".weight"):
            weights[name] = 1 + 0.2 * value
        elif len(shape) == 4:
            weights[name] = value / (shape[1] * shape[2] * shape[3]) ** 0.5
        else:
            weights[name] = value if "embedding" in name else 0.2 * value
    return weights


class SlowTaming:
    """Both networks in float64."""

    def __init__(self, sizes: Sizes, weights: Mapping[str, Tensor]) -> None:
        self.s = sizes
        self.w = {name: value.double() for name, value in weights.items()}

    def encode(self, x: Tensor, unused: tuple[int, ...] = ()) -> Tensor:
        """Images -> what is compared with the codes. Attention of the levels `unused` does not run."""
        h = self.conv("encoder.conv_in", x.double())
        for i in range(len(self.s.ch_mult)):
            for j in range(self.s.num_res_blocks):
                h = self.block(f"encoder.down.{i}.block.{j}", h)
                if i not in unused:
                    h = self.attend(f"encoder.down.{i}.attn.{j}", h)
            if i < len(self.s.ch_mult) - 1:
                h = self.halve(f"encoder.down.{i}.downsample.conv", h)
        return self.conv("quant_conv", self.end("encoder", self.middle("encoder", h)))

    def decode(self, z_q: Tensor) -> Tensor:
        h = self.conv("decoder.conv_in", self.conv("post_quant_conv", z_q.double()))
        h = self.middle("decoder", h)
        for i in reversed(range(len(self.s.ch_mult))):
            for j in range(self.s.num_res_blocks + 1):
                h = self.block(f"decoder.up.{i}.block.{j}", h)
                h = self.attend(f"decoder.up.{i}.attn.{j}", h)
            if i:
                h = self.double(f"decoder.up.{i}.upsample.conv", h)
        h = self.end("decoder", h)
        return torch.tanh(h) if self.s.tanh_out else h

    def indices(self, z: Tensor, rule: str = "nearest") -> Tensor:
        codes = self.w["quantize.embedding.weight"]
        scores = torch.einsum("bdhw,kd->bhwk", z, codes)
        if rule == "nearest":
            scores = 2 * scores - (codes * codes).sum(1)
        return scores.argmax(3)

    def rows(self, indices: Tensor) -> Tensor:
        return self.w["quantize.embedding.weight"][indices].permute(0, 3, 1, 2)

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: bool = True) -> Tensor:
        weight, bias = self.w[f"{name}.weight"], self.w.get(f"{name}.bias")
        side = weight.shape[2]
        n, _, height, width = x.shape
        margin = side // 2 if padding else 0
        columns = torch.nn.functional.unfold(x, side, padding=margin, stride=stride)
        y = weight.flatten(1) @ columns
        if bias is not None:
            y = y + bias[:, None]
        h = (height + 2 * margin - side) // stride + 1
        w = (width + 2 * margin - side) // stride + 1
        return y.view(n, -1, h, w)

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.reshape(x.shape[0], 32, -1)
        centred = groups - groups.mean(2, keepdim=True)
        scaled = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return scaled.view(x.shape) * weight[:, None, None] + bias[:, None, None]

    def swish(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", self.swish(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", self.swish(self.norm(f"{name}.norm2", h)))
        has_shortcut = f"{name}.nin_shortcut.weight" in self.w
        return h + (self.conv(f"{name}.nin_shortcut", x) if has_shortcut else x)

    def attend(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.to_qkv.weight" in self.w:
            q, k, v = self.conv(f"{name}.to_qkv", x).flatten(2).chunk(3, 1)
            k = k.exp() / k.exp().sum(2, keepdim=True)
            context = torch.einsum("bdn,ben->bde", k, v)
            mixed = torch.einsum("bde,bdn->ben", context, q)
            return self.conv(f"{name}.to_out", mixed.reshape(x.shape))
        if f"{name}.q.weight" not in self.w:
            return x
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        scores = torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5
        mixed = torch.einsum("bij,bcj->bci", scores.softmax(2), v).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", mixed)

    def middle(self, side: str, h: Tensor) -> Tensor:
        h = self.block(f"{side}.mid.block_1", h)
        h = self.attend(f"{side}.mid.attn_1", h)
        return self.block(f"{side}.mid.block_2", h)

    def end(self, side: str, h: Tensor) -> Tensor:
        return self.conv(f"{side}.conv_out", self.swish(self.norm(f"{side}.norm_out", h)))

    def halve(self, name: str, x: Tensor) -> Tensor:
        if not self.s.resamp_with_conv:
            return x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
        zeros = torch.zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1, dtype=x.dtype)
        zeros[:, :, :-1, :-1] = x
        return self.conv(name, zeros, stride=2, padding=False)

    def double(self, name: str, x: Tensor) -> Tensor:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return self.conv(name, x) if self.s.resamp_with_conv else x
