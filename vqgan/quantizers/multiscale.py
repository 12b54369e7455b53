"""Grids of codes of growing sizes, each for the residual of those before it."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.collectives import broadcast
from codegrid.engine.errors import InputError
from codegrid.engine.sizes import Size, SizeSetting
from vqgan.quantizers.base import Quantized, Quantizer, require_indices
from vqgan.quantizers.codebook import Codebook
from vqgan.quantizers.gradients import straight_through
from vqgan.quantizers.gumbel import Gumbel
from vqgan.quantizers.kmeans import kmeans
from vqgan.quantizers.precision import float32
from vqgan.quantizers.scales import TOUCH, Scales
from vqgan.quantizers.search import flatten, nearest, unflatten

if TYPE_CHECKING:
    from codegrid.evaluation.codebook import CodebookUse


class MultiScaleResidual(Quantizer):
    """A residual quantizer over grids of growing sizes (Tian et al. 2024, VAR, algorithm 1).

    What the scales so far leave of z_e shrinks to the next grid, the nearest codes there are enlarged again and added: see
    `Scales`. Two scales with a codebook each are the hierarchy of VQ-VAE-2 (Razavi et al. 2019). Indices are one row
    (B, 1, L): the grids one after the other, each in raster order; `lookup` takes the row of all scales or of the first ones.

    The gradient of z_q is copied to z_e, past all scales: the sum of their estimators would count it once for each.

    `inner(K=..., dim=...)` builds a codebook: one for all scales if it is `shared`, otherwise one for each. Of a shared one each
    scale counts as much as every other, in the running counts, the running means and the revival of dead codes: if outputs
    counted alike, the last grid would have nearly all of them, and codes of the coarse ones would die and come back as fine ones.

    The loss is the mean over the scales of the inner losses and, for the convolutions, of |z_hat_k - sg(z_e)|^2.
    """

    is_gridded = False
    K: int

    def __init__(
        self,
        inner: Callable[..., Quantizer],
        K: int,
        dim: int | None,
        scales: Sequence[SizeSetting] | None,
        shared: bool,
        convolutions: int,
        strength: float,
        **when: Any,
    ) -> None:
        first = inner(K=K, dim=dim)
        kind = type(first).__name__
        if first.K is None or first.num_codebooks != 1:
            raise InputError(
                f"quantizer.inner={kind} must have exactly one codebook; use one such as ema or vq"
            )
        if getattr(first, "cosine", False):
            raise InputError(
                "quantizer.inner.cosine=true can't be in multiscale: codes of length 1 can't represent residuals, "
                "which shrink; use false"
            )
        if isinstance(first, Gumbel):
            raise InputError(
                "quantizer@quantizer.inner=gumbel can't be in multiscale: its codes learn by the decoder's gradient, which goes "
                "past the scales to the encoder; use ema"
            )
        gradient = getattr(first, "gradient", "straight_through")
        if gradient != "straight_through":
            raise InputError(
                f"quantizer.inner.gradient={gradient} can't be in multiscale, where the decoder's gradient goes past the scales to "
                "the encoder; use straight_through"
            )
        if shared and not isinstance(first, Codebook):
            raise InputError(
                f"quantizer.shared=true needs learned codes, which serve residuals of every size, and {kind} has none; use "
                "quantizer.shared=false, or quantizer@quantizer.inner=ema"
            )
        if first.begin:
            raise InputError(
                f"quantizer.inner.from={first.begin} must be 0: all scales come into use together; "
                f"use quantizer.from={first.begin}"
            )
        super().__init__(first.K, first.dim, **when)
        self.shared = shared
        self.inner = nn.ModuleList([first])
        self.scales = Scales(first.dim, scales, convolutions, strength)
        self._build_inner = partial(inner, K=K, dim=dim)
        self._complete()

    def _complete(self) -> None:
        """Build the codebooks of the scales after the first, once their number is known."""
        if not self.shared:
            while len(self.inner) < len(self.scales.sizes):
                self.inner.append(self._build_inner())

    def bind(self, grid: Size | None) -> None:
        if grid is None:
            raise InputError(
                "quantizer=multiscale needs codes with places, and those of a sequence have none; use quantizer=residual"
            )
        self.scales.bind(grid)
        self._complete()

    def list_codebooks(self) -> list[Quantizer]:
        return [self.codebook_of(k) for k in range(len(self.lengths))]

    def list_parts(self, q: Quantized) -> list[tuple[Quantizer, Quantized]]:
        """The codebook of each scale with its output there: a shared one comes once for each scale."""
        return [(self.codebook_of(k), part) for k, part in enumerate(q.parts)]

    @property
    def inner_quantizers(self) -> list[Quantizer]:
        """The codebooks: one, or one for each scale."""
        return [inner for inner in self.inner if isinstance(inner, Quantizer)]

    def codebook_of(self, scale: int) -> Quantizer:
        """The codebook of a scale, counted from 0."""
        return self.inner_quantizers[0 if self.shared else scale]

    def code_shape(self, grid: Size) -> tuple[int, ...]:
        return 1, sum(self.scales.lengths(grid))

    @property
    def bits(self) -> float:
        """Bits of all codes, divided by the positions of the last grid."""
        h, w = self.scales.grid
        return super().bits * sum(self.scales.lengths()) / (h * w)

    @property
    def lengths(self) -> list[int]:
        return self.scales.lengths()

    def make_code_use(self) -> "CodebookUse":
        from codegrid.evaluation.codebook import CodebookUse

        return CodebookUse(self.K, lengths=self.lengths, shared=self.shared)

    @property
    def prefixes(self) -> Sequence[int]:
        """The numbers of leading codes that `lookup` decodes without the others: those of the first scales."""
        lengths = self.lengths
        return [sum(lengths[: i + 1]) for i in range(len(lengths))]

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        z_e = z_e.float()
        z_hat = torch.zeros_like(z_e)
        parts: list[Quantized] = []
        fits: list[Tensor] = []
        for k, size in enumerate(self.scales.sizes_on((z_e.shape[2], z_e.shape[3]))):
            residual = z_e - z_hat.detach()
            q = self.codebook_of(k)(self.scales.shrink(residual, size))
            parts.append(q)
            z_hat = self.add_codes(z_hat, require_indices(q), k)
            if self.scales.num_convolutions:
                fits.append(F.mse_loss(z_hat, z_e.detach()))
        loss = reduce(add, (q.loss for q in parts)) / len(parts)
        terms = {
            f"{name}_{k}": value for k, q in enumerate(parts) for name, value in q.terms.items()
        }
        if fits:
            fit = reduce(add, fits) / len(fits)
            loss = loss + fit
            terms["fit"] = fit.detach()
        indices = torch.cat([require_indices(q).flatten(1) for q in parts], 1)[:, None]
        return Quantized(z_e, straight_through(z_e, z_hat.detach()), indices, loss, terms, parts)

    def add_codes(self, z_hat: Tensor, indices: Tensor, scale: int) -> Tensor:
        """z_hat (B, dim, h, w) with the codes (B, rows, columns) of a scale added; only the convolutions have gradients."""
        vectors = self.codebook_of(scale).lookup(indices).detach()
        return self.scales.add(z_hat, vectors, scale)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (B, 1, n) of all scales, or of the first ones -> z_q (B, dim, h, w) of the model's grid."""
        return self.lookup_on(indices, self.scales.grid)

    @float32
    def lookup_on(self, indices: Tensor, grid: Size) -> Tensor:
        z_hat = torch.zeros(indices.shape[0], self.dim, *grid, device=indices.device)
        for k, codes in enumerate(self.scales.split(indices.flatten(1), grid)):
            z_hat = self.add_codes(z_hat, codes, k)
        return z_hat

    @torch.no_grad()
    def code_vectors(self) -> Tensor:
        """All code vectors: (1, K, dim) if one codebook is shared, otherwise (scales, K, dim)."""
        return torch.cat([inner.code_vectors() for inner in self.inner_quantizers])

    @float32
    @torch.no_grad()
    def restrict(self, indices: Tensor, known: Tensor) -> Tensor:
        """The codes anew, as far as they have a part of the places (h, w) that are `known`, from these places alone.

        A coarse code describes the whole image. Here it is the code nearest to the mean over what is known of its cell, so that
        it says nothing of what is to be drawn, and the codes of finer scales describe what that leaves.
        """
        if bool(known.all()):
            return indices
        target = self.lookup(indices)
        places = known[None, None].to(target)
        z_hat = torch.zeros_like(target)
        rows: list[Tensor] = []
        for k, own in enumerate(self.scales.split(indices.flatten(1))):
            size = (own.shape[1], own.shape[2])
            share = self.scales.shrink(places, size)
            touched = share > TOUCH
            means = self.scales.shrink((target - z_hat) * places, size) / share.clamp(min=TOUCH)
            codes = require_indices(self.codebook_of(k)(means))
            vectors = self.codebook_of(k).lookup(codes) * touched
            z_hat = self.scales.add(z_hat, vectors, k)
            rows.append(torch.where(touched[:, 0], codes, own).flatten(1))
        return torch.cat(rows, 1)[:, None]

    def lr_multipliers(self) -> dict[nn.Parameter, float]:
        return {
            parameter: rate
            for inner in self.inner_quantizers
            for parameter, rate in inner.lr_multipliers().items()
        }

    @torch.no_grad()
    def update(self, q: Quantized, rate: float = 1.0) -> None:
        super().update(q, rate)
        [first, *_] = self.inner_quantizers
        if self.shared:
            assert isinstance(first, Codebook)
            first.update_from(q.parts, rate)
            return
        for inner, part in zip(self.inner_quantizers, q.parts, strict=True):
            inner.update(part, rate)

    def initialise(self, z: Tensor) -> None:
        """As `initialise_maps`, from outputs z (n, in_dim) that are maps of the model's grid, one after the other."""
        h, w = self.scales.grid
        maps = z[: len(z) // (h * w) * h * w].view(-1, h, w, z.shape[1]).movedim(-1, 1)
        self.initialise_maps(maps, len(z))

    @torch.no_grad()
    def initialise_maps(self, z: Tensor, most: int) -> None:
        """Fit the codes to maps z (n, in_dim, h, w), scale by scale, each to the residual of those before it.

        Of a shared codebook each scale gets an equal share by k-means of its own residuals.
        """
        z = z.float()
        z_hat = torch.zeros_like(z)
        sizes = self.scales.sizes
        shares = [
            self.K * (k + 1) // len(sizes) - self.K * k // len(sizes) for k in range(len(sizes))
        ]
        tables: list[Tensor] = []
        counts: list[Tensor] = []
        for k, size in enumerate(sizes):
            inner = self.codebook_of(k)
            residual = self.scales.shrink(z - z_hat, size)
            rows = flatten(residual)
            rows = rows[:: max(1, len(rows) // most)]
            if not self.shared:
                inner.initialise(rows)
                codes = require_indices(inner(residual))
                z_hat = self.add_codes(z_hat, codes, k)
                continue
            assert isinstance(inner, Codebook)
            if not inner.kmeans or not shares[k]:
                continue
            centres, members = (broadcast(each) for each in kmeans(rows, shares[k]))
            tables.append(centres)
            counts.append(members * shares[k] / len(rows))
            vectors = centres[nearest(flatten(residual), centres)]
            z_hat = self.scales.add(z_hat, unflatten(vectors, residual), k)
        if tables:
            inner = self.codebook_of(0)
            assert isinstance(inner, Codebook)
            inner.set_codes(slice(None), torch.cat(tables), torch.cat(counts).clamp(min=0.1))
