"""What the priors share that fill in masked codes, in any order or many at once."""

import zlib
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from prior.decoding.filling import begin_filling, plan_steps
from prior.decoding.kv_decoder import StepCache
from prior.decoding.sampling import Numbers, Sampler, guided
from prior.models.backbone import Transformer, TransformerSettings
from prior.models.base import Prediction, double_for_guidance, draw_all_codes, single_codebook
from prior.models.inputs import CodeEmbedding, LabelEmbedding
from prior.models.transformer import Stack


class Masked(Transformer):
    """A transformer that predicts masked codes from all others, wherever they are.

    Codes drawn one after the other in a random order follow a distribution: the mean of those of all orders. The prior is
    judged by the bound on it of order-agnostic models (Hoogeboom et al. 2022, section 3), which is also the bound of
    absorbing-state diffusion in continuous time (Austin et al. 2021, section 4).
    """

    exact = False
    any_order = True
    own_order: str  # in which codes are drawn with sampler.order=null
    takes_front = True
    blocks: Stack

    def __init__(
        self, codebook: Tensor, grid: tuple[int, int], classes: int = 0, **network: Any
    ) -> None:
        """`network` are the TransformerSettings."""
        super().__init__(single_codebook(codebook), grid, classes)
        settings = TransformerSettings(**network)
        self.read = CodeEmbedding(codebook[0], settings.width, settings.inputs)
        self.unread = nn.Parameter(torch.zeros(settings.width))  # read in place of a masked code
        self.label = LabelEmbedding(classes, settings.width)
        self.add_backbone(settings, {"blocks": settings.depth}, causal=False)

    def forward(self, codes: Tensor, masked: Tensor, labels: Tensor | None = None) -> Tensor:
        """codes (B, L), of which those `masked` (B, L) are not read, labels (B, ...) -> logits (B, L, K) float32."""
        return self.head.logits(self.features(codes, masked, labels))

    def features(self, codes: Tensor, masked: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `forward`, what the head reads (B, L, width)."""
        x = torch.where(masked[..., None], self.unread, self.read(codes))
        x = x + self.place + self.label(codes.shape[0], labels)[:, None]
        features: Tensor = self.norm(self.run_stack(self.blocks, x, self.angles, labels))
        return features

    def judge(self, codes: Tensor, labels: Tensor | None) -> Prediction:
        # A grid's masks depend on its codes only, not on the batch that it comes in.
        seeds = [zlib.crc32(grid.tobytes()) for grid in codes.cpu().numpy()]
        return self.bound(codes, labels, Numbers(0, seeds, codes.device).uniform(1 + self.L))

    def redraw(
        self, codes: Tensor, labels: Tensor | None, uniform: Tensor, sampler: Sampler
    ) -> Tensor:
        """Given a random set of the others, of any size, or given its complement."""
        masks = torch.rand(len(codes), 1 + self.L, device=codes.device)
        return draw_all_codes(self.bound(codes, labels, masks), uniform, sampler, self.K)

    def bound(self, codes: Tensor, labels: Tensor | None, uniform: Tensor) -> Prediction:
        """An unbiased estimate of an upper bound on -log p, by numbers (B, 1 + L) float64, uniform in [0, 1).

        The bound is the mean over m = 1 ... L, and over the sets of m codes, of the mean -log p of these m given the others.
        A set is used together with its complement: L - m is distributed as m is, and a hard set is balanced by an easy one.
        So every code is predicted once, in two runs of the network.
        """
        m = (uniform[:, :1] * self.L).long()
        m = torch.where(m == 0, self.L, m)  # the set of all codes has no complement
        masked = random_subset(uniform[:, 1:], m)
        features = torch.where(
            masked[..., None],
            self.features(codes, masked, labels),
            self.features(codes, ~masked, labels),
        )
        size = torch.where(masked, m, self.L - m)
        sets = 1 + (m < self.L).long()
        return Prediction(features, codes, self.L / (size * sets).float(), self.readout)

    @abstractmethod
    def own_steps(self, total: int) -> int:
        """The number of steps in which `total` codes are drawn with sampler.steps=0."""

    @abstractmethod
    def missing_after(self, step: int, steps: int, total: int) -> int:
        """How many of `total` codes are missing after step 1 ... steps."""

    def schedule(self, sampler: Sampler, total: int) -> list[int]:
        """How many codes are missing at first, `total`, and after each step.

        There are at most as many steps as codes, each of which draws at least one, unless codes are masked again.
        """
        steps = sampler.steps or self.own_steps(total)
        if not sampler.remask:
            steps = min(steps, total)
        missing = [total]
        for step in range(1, steps + 1):
            after = self.missing_after(step, steps, total)
            missing.append(min(after, missing[-1] - 1) if steps <= total else after)
        return missing

    def fill(
        self,
        codes: Tensor,
        known: Tensor,
        numbers: Numbers,
        sampler: Sampler,
        labels: Tensor | None,
        cache: StepCache | None = None,
    ) -> Tensor:
        """Each step draws some of the missing codes, and masks others again (predictor); then it draws some again (corrector).

        A corrector step draws as many as the step before it, at most half of those that are there: the ones drawn longest ago,
        or the least confident ones. The choice of the former does not depend on the codes, so drawing one at a time leaves a
        consistent prior's distribution as it is (Gibbs sampling).
        """
        codes = codes.clone()
        order = sampler.order or self.own_order
        filling = begin_filling(order, self.grid, codes, known, numbers, sampler)
        masked = torch.zeros_like(codes, dtype=torch.bool).scatter_(1, filling.missing, True)
        missing = self.schedule(sampler, filling.missing.shape[1])
        for step, (count, again) in enumerate(plan_steps(missing, sampler.remask), 1):
            if not count:
                continue
            progress = step / (len(missing) - 1)
            places = filling.candidates(count)
            uniform = filling.next_uniform()
            share = 1 - filling.missing.shape[1] / self.L
            drawn, logp = self.propose(codes, masked, places, uniform, sampler, labels, share)
            filling.rank(places, logp, progress)
            proposed = codes.scatter(1, places, drawn)
            remasked = filling.remask(again)  # before this step's own codes can be among them
            accepted = filling.accept(count)
            codes.scatter_(1, accepted, proposed.gather(1, accepted))
            masked.scatter_(1, accepted, False)
            masked.scatter_(1, remasked, True)
            if cache is not None and cache.watch is not None:
                cache.watch(accepted, codes.gather(1, accepted))
            renewed = min(count, filling.drawn.shape[1] // 2)
            for _ in range(sampler.corrector if renewed else 0):
                places = filling.renew(renewed)
                masked.scatter_(1, places, True)
                uniform = numbers.uniform(self.L)
                share = 1 - (filling.missing.shape[1] + renewed) / self.L
                drawn, logp = self.propose(codes, masked, places, uniform, sampler, labels, share)
                filling.rank(places, logp, progress)
                codes.scatter_(1, places, drawn)
                masked.scatter_(1, places, False)
                if cache is not None and cache.watch is not None:
                    cache.watch(places, drawn)
        return codes

    def propose(
        self,
        codes: Tensor,
        masked: Tensor,
        places: Tensor,
        uniform: Tensor,
        sampler: Sampler,
        labels: Tensor | None,
        drawn_share: float,
    ) -> tuple[Tensor, Tensor]:
        """Codes (n, r) for the places (n, r), and log p (n, r) of each at the sampler's temperature.

        Each code is drawn independently of the others, by the number of its place in uniform (n, L). `drawn_share` is the
        share of the codes that are not masked, for guidance.
        """
        doubled, guide = double_for_guidance(labels, sampler)
        copies = 1 + guide
        features = self.features(codes.repeat(copies, 1), masked.repeat(copies, 1), doubled)
        at_places = places.repeat(copies, 1)[..., None].expand(-1, -1, features.shape[-1])
        features = features.gather(1, at_places)
        own = uniform.gather(1, places).flatten()
        if not guide and self.head.draws_directly(sampler):
            drawn = self.head.draw(features.flatten(0, 1), own).view_as(places)
            return drawn, -self.head.nats(features, drawn)
        logits = self.head.logits(features)
        if guide:
            conditional, unconditional = logits.chunk(2)
            logits = guided(conditional, unconditional, sampler.scale(drawn_share))
        drawn = self.head.draw_from_logits(logits.flatten(0, 1), own, sampler).view_as(places)
        logp = (logits / sampler.temperature).log_softmax(-1)
        return drawn, logp.gather(-1, drawn[..., None])[..., 0]


def random_subset(uniform: Tensor, m: Tensor) -> Tensor:
    """Sets (B, L) bool of m (B, 1) places each, all sets equally likely if the numbers (B, L) are random."""
    return uniform.argsort(1).argsort(1) < m
