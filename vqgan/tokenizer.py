"""Images to indices and back: all that stage 2 ever sees of stage 1."""

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import InputError
from vqgan.blocks import zero_init
from vqgan.decoder import Decoder
from vqgan.encoder import Encoder
from vqgan.patches import Patches
from vqgan.quantizers.base import NO_CODES_MESSAGE, Quantized, Quantizer
from vqgan.quantizers.search import flatten

STARTS = ("patches", "random")


class Tokenizer(nn.Module):
    """Encoder -> 1x1 convolution -> quantizer -> 3x3 convolution -> decoder.

    With start="patches" a linear map of patches runs beside both networks and the whole starts as classical vector
    quantization; with "random" there are the networks alone.
    """

    def __init__(
        self, encoder: Encoder, quantizer: Quantizer, decoder: Decoder, start: str = "patches"
    ) -> None:
        super().__init__()
        if start not in STARTS:
            raise InputError(f"model.start={start} must be one of {', '.join(STARTS)}")
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.into = nn.Conv2d(encoder.out_channels, quantizer.in_dim, 1)
        self.out = nn.Conv2d(quantizer.dim, decoder.in_channels, 3, padding=1)
        self.patches = (
            Patches(encoder.channels, encoder.f, quantizer.dim) if start == "patches" else None
        )
        if self.patches is not None:
            zero_init(self.into)

    @property
    def K(self) -> int | None:
        """Codes of a codebook; None for a continuous bottleneck."""
        return self.quantizer.K

    @property
    def num_codebooks(self) -> int:
        """Codes a position of the grid, each from a codebook of its own."""
        return self.quantizer.num_codebooks

    @property
    def dim(self) -> int:
        return self.quantizer.dim

    @property
    def code_space(self) -> dict[str, Any]:
        """What a prior over these codes is built from: codebook (num_codebooks, K, dim) and grid (h, w)."""
        return {"codebook": self.quantizer.codebooks(), "grid": self.grid}

    @property
    def grid(self) -> tuple[int, int]:
        return self.encoder.grid

    @property
    def f(self) -> int:
        return self.encoder.f

    def encode(self, x: Tensor) -> Quantized:
        """x (B, C, H, W) in [-1, 1] -> z_e, z_q, indices and the bottleneck's loss."""
        z_e = self.into(self.encoder(x))
        if self.patches is not None:
            z_e = z_e + F.pad(
                self.patches.encode(x), (0, 0, 0, 0, 0, self.quantizer.in_dim - self.dim)
            )
        q: Quantized = self.quantizer(z_e)
        return q

    def decode(self, z_q: Tensor) -> Tensor:
        """z_q (B, dim, h, w) -> x_hat (B, C, H, W) float32, about [-1, 1] but not clamped."""
        x_hat = self.decoder(self.out(z_q))
        if self.patches is not None:
            x_hat = x_hat + self.patches.decode(z_q)
        return x_hat.float()

    def indices(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> indices (B, h, w) int64, or (B, h, w, num_codebooks) of several codebooks."""
        found = self.encode(x).indices
        if found is None:
            raise InputError(NO_CODES_MESSAGE)
        return found

    def decode_indices(self, indices: Tensor) -> Tensor:
        """indices as `indices` gives them -> x_hat (B, C, H, W), the same as decode(encode(x).z_q)."""
        return self.decode(self.quantizer.lookup(indices))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Before the first step: fit the linear maps (if any) and the codes to images x (n, C, H, W) in [-1, 1]."""
        if self.patches is not None:
            self.patches.initialise(x)
            z = torch.cat(
                [flatten(self.patches.encode(part)) for part in x.split(64)]
            )  # the networks still add zero
        else:
            z = torch.cat([flatten(self.into(self.encoder(part))) for part in x[:512].split(64)])
        self.quantizer.initialise(
            z[:: max(1, len(z) // 100_000)]
        )  # as many as k-means needs, from all over the images

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the weights: what a code cache and a prior remember their tokenizer by."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]
