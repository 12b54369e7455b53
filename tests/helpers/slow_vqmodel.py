"""The forward pass of diffusers' VQModel, MoVQ among them, written out operation by operation from its description.

The forward pass shares no part with the package; it takes the weights by their public names and computes in their precision.
The files of taming, MoVQGAN and LlamaGen hold the same networks under other names.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgan.tokenizer import Tokenizer

Weights = Mapping[str, Tensor]


def make_config(widths: Sequence[int], **settings: Any) -> dict[str, Any]:
    """A config.json of a model of these widths, with diffusers' defaults for what isn't in `settings`."""
    levels = len(widths)
    return {
        "_class_name": "VQModel",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(widths),
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": 3,
        "num_vq_embeddings": 24,
        "norm_num_groups": 32,
        "vq_embed_dim": None,
        "norm_type": "group",
        "mid_block_add_attention": True,
        "lookup_from_codebook": False,
        **settings,
    }


class ShapeList:
    """Names and shapes of a VQModel, in any order, as its config says."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.shapes: dict[str, tuple[int, ...]] = {}
        widths = list(config["block_out_channels"])
        depth, z_channels = config["layers_per_block"], config["latent_channels"]
        self.dim = dim = config["vq_embed_dim"] or z_channels
        self.conv("encoder.conv_in", widths[0], config["in_channels"], 3)
        width = widths[0]
        for i, kind in enumerate(config["down_block_types"]):
            part = f"encoder.down_blocks.{i}"
            self.stack(part, width, widths[i], depth, kind.startswith("Attn"), False)
            if i < len(widths) - 1:
                self.conv(f"{part}.downsamplers.0.conv", widths[i], widths[i], 3)
            width = widths[i]
        self.middle("encoder", width, False)
        self.norm("encoder.conv_norm_out", width, False)
        self.conv("encoder.conv_out", z_channels, width, 3)
        self.conv("quant_conv", dim, z_channels, 1)
        self.shapes["quantize.embedding.weight"] = (config["num_vq_embeddings"], dim)
        self.conv("post_quant_conv", z_channels, dim, 1)
        spatial = config["norm_type"] == "spatial"
        self.conv("decoder.conv_in", width, z_channels, 3)
        self.middle("decoder", width, spatial)
        for i, kind in enumerate(config["up_block_types"]):
            part, out = f"decoder.up_blocks.{i}", widths[::-1][i]
            self.stack(part, width, out, depth + 1, kind.startswith("Attn"), spatial)
            if i < len(widths) - 1:
                self.conv(f"{part}.upsamplers.0.conv", out, out, 3)
            width = out
        self.norm("decoder.conv_norm_out", width, spatial)
        self.conv("decoder.conv_out", config["out_channels"], width, 3)

    def conv(self, name: str, out: int, width: int, side: int) -> None:
        self.shapes |= {f"{name}.weight": (out, width, side, side), f"{name}.bias": (out,)}

    def norm(self, name: str, width: int, spatial: bool) -> None:
        if spatial:
            self.conv(f"{name}.conv_y", width, self.dim, 1)
            self.conv(f"{name}.conv_b", width, self.dim, 1)
            name = f"{name}.norm_layer"
        self.shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def block(self, name: str, width: int, out: int, spatial: bool) -> None:
        self.norm(f"{name}.norm1", width, spatial)
        self.conv(f"{name}.conv1", out, width, 3)
        self.norm(f"{name}.norm2", out, spatial)
        self.conv(f"{name}.conv2", out, out, 3)
        if width != out:
            self.conv(f"{name}.conv_shortcut", out, width, 1)

    def attention(self, name: str, width: int, spatial: bool) -> None:
        self.norm(f"{name}.{'spatial_norm' if spatial else 'group_norm'}", width, spatial)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            self.shapes[f"{name}.{part}.weight"] = (width, width)
            self.shapes[f"{name}.{part}.bias"] = (width,)

    def stack(self, name: str, width: int, out: int, n: int, attends: bool, spatial: bool) -> None:
        for j in range(n):
            self.block(f"{name}.resnets.{j}", out if j else width, out, spatial)
            if attends:
                self.attention(f"{name}.attentions.{j}", out, spatial)

    def middle(self, side: str, width: int, spatial: bool) -> None:
        for j in range(2):
            self.block(f"{side}.mid_block.resnets.{j}", width, width, spatial)
        if self.config["mid_block_add_attention"]:
            self.attention(f"{side}.mid_block.attentions.0", width, spatial)


def draw_weights(config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Weights of a VQModel of this config at which all parts matter, with codes among the outputs of its encoder."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in ShapeList(config).shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 and "embedding" not in name else 1
        values = torch.randn(shape, generator=generator) / fan_in**0.5
        is_scale = len(shape) == 1 and name.endswith("weight")
        weights[name] = values * 0.3 + (1 if is_scale or name.endswith("conv_y.bias") else 0)
    x = torch.rand(1, config["in_channels"], 48, 48, generator=generator) * 2 - 1
    outputs = SlowVQModel(weights, config).encode(x).movedim(1, -1).flatten(0, 2)
    places = torch.randperm(len(outputs), generator=generator)[: config["num_vq_embeddings"]]
    weights["quantize.embedding.weight"] = outputs[places]
    return weights


class SlowVQModel:
    """Encoder, choice and decoder of a VQModel, from its weights and config."""

    def __init__(self, weights: Weights, config: Mapping[str, Any]) -> None:
        self.weights, self.config = weights, config
        self.groups = config["norm_num_groups"]

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        if weight.ndim == 2:
            weight = weight[:, :, None, None]
        side = weight.shape[-1]
        if stride == 2:  # a column of zeros at the right and a row at the bottom
            x = torch.cat([x, torch.zeros_like(x[..., :1])], -1)
            x = torch.cat([x, torch.zeros_like(x[..., :1, :])], -2)
        return F.conv2d(x, weight, bias, stride, 0 if stride == 2 else side // 2)

    def norm(self, name: str, x: Tensor, codes: Tensor) -> Tensor:
        spatial = f"{name}.conv_y.weight" in self.weights
        inner = f"{name}.norm_layer" if spatial else name
        groups = x.reshape(len(x), 32 if spatial else self.groups, -1)
        centred = groups - groups.mean(2, keepdim=True)
        scaled = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
        weight, bias = self.weights[f"{inner}.weight"], self.weights[f"{inner}.bias"]
        y = scaled.view_as(x) * weight[:, None, None] + bias[:, None, None]
        if not spatial:
            return y
        times = x.shape[-1] // codes.shape[-1]
        large = codes.repeat_interleave(times, -1).repeat_interleave(times, -2)
        return y * self.conv(f"{name}.conv_y", large) + self.conv(f"{name}.conv_b", large)

    def block(self, name: str, x: Tensor, codes: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm1", x, codes)
        h = self.conv(f"{name}.conv1", h * h.sigmoid())
        h = self.norm(f"{name}.norm2", h, codes)
        h = self.conv(f"{name}.conv2", h * h.sigmoid())
        if f"{name}.conv_shortcut.weight" in self.weights:
            x = self.conv(f"{name}.conv_shortcut", x)
        return x + h

    def attention(self, name: str, x: Tensor, codes: Tensor) -> Tensor:
        spatial = f"{name}.spatial_norm.conv_y.weight" in self.weights
        h = self.norm(f"{name}.{'spatial_norm' if spatial else 'group_norm'}", x, codes)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in ("to_q", "to_k", "to_v"))
        scores = torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5
        mixed = torch.einsum("bij,bcj->bci", scores.softmax(2), v)
        return x + self.conv(f"{name}.to_out.0", mixed.view_as(x))

    def stack(self, name: str, x: Tensor, codes: Tensor) -> Tensor:
        j = 0
        while f"{name}.resnets.{j}.conv1.weight" in self.weights:
            x = self.block(f"{name}.resnets.{j}", x, codes)
            if f"{name}.attentions.{j}.to_q.weight" in self.weights:
                x = self.attention(f"{name}.attentions.{j}", x, codes)
            j += 1
        return x

    def levels(self) -> Sequence[int]:
        return range(len(self.config["block_out_channels"]))

    def encode(self, x: Tensor) -> Tensor:
        """Images in the model's own range -> what is compared with the codes."""
        h = self.conv("encoder.conv_in", x)
        for i in self.levels():
            h = self.stack(f"encoder.down_blocks.{i}", h, h)
            if i < len(self.levels()) - 1:
                h = self.conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", h, stride=2)
        h = self.stack("encoder.mid_block", h, h)
        h = self.norm("encoder.conv_norm_out", h, h)
        return self.conv("quant_conv", self.conv("encoder.conv_out", h * h.sigmoid()))

    def measure(self, z_e: Tensor) -> Tensor:
        """Squared distances of each position to all codes, (B, h, w, K)."""
        differences = z_e.movedim(1, -1)[..., None, :] - self.weights["quantize.embedding.weight"]
        return differences.square().sum(-1)

    def choose(self, z_e: Tensor) -> Tensor:
        """The nearest code of each position, (B, h, w)."""
        return self.measure(z_e).argmin(-1)

    def find_ties(self, z_e: Tensor) -> Tensor:
        """Where the squared distances to the two nearest codes differ by less than float32 resolves in |z_e|^2, (B, h, w)."""
        nearest = self.measure(z_e).topk(2, largest=False).values
        return nearest[..., 1] - nearest[..., 0] < 1e-6 * z_e.square().sum(1)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) -> images in the model's own range."""
        codes = self.weights["quantize.embedding.weight"][indices].movedim(-1, 1)
        h = self.conv("decoder.conv_in", self.conv("post_quant_conv", codes))
        h = self.stack("decoder.mid_block", h, codes)
        for i in self.levels():
            h = self.stack(f"decoder.up_blocks.{i}", h, codes)
            if i < len(self.levels()) - 1:
                h = h.repeat_interleave(2, -1).repeat_interleave(2, -2)
                h = self.conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", h)
        h = self.norm("decoder.conv_norm_out", h, codes)
        return self.conv("decoder.conv_out", h * h.sigmoid())


@torch.no_grad()
def assert_equals_slow(tokenizer: Tokenizer, slow: SlowVQModel, x: Tensor) -> None:
    """Fail unless the tokenizer has the model's codes, latents and pictures of float64 images x, in the model's own range."""
    outside = x if tokenizer.pixels == (-1, 1) else 2 * x - 1
    precise = type(slow)(
        {name: value.double() for name, value in slow.weights.items()}, slow.config
    )
    z_e = precise.encode(x)
    indices = precise.choose(z_e)
    assert len(indices.unique()) > 1
    ties = precise.find_ties(z_e)
    assert ties.float().mean() < 0.1
    assert torch.equal(tokenizer.indices(outside.float())[~ties], indices[~ties])
    tokenizer.double()
    torch.testing.assert_close(tokenizer.encode_features(outside), z_e, atol=1e-9, rtol=1e-9)
    x_hat = precise.decode(indices)
    if tokenizer.pixels != (-1, 1):
        x_hat = 2 * x_hat - 1
    torch.testing.assert_close(
        tokenizer.decode_indices(indices), x_hat.float(), atol=1e-5, rtol=1e-6
    )
