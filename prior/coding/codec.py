"""Codes of images to files and back, under a prior."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from codegrid.engine.precision import RoundingWatch, without_autocast
from prior.coding.coder import CodeReader, CodeWriter, import_constriction, read_codes
from prior.coding.file import CodedFile
from prior.coding.frequencies import IntArray, choose_phase, scale_logits, weigh
from prior.models.base import PriorModel
from vqgan.tokenizer import Tokenizer, hash_weights

MAX_CODED_LOGITS = 2**23  # in memory at once, 64 MiB in float64
SAFETY = 100  # by how much the distance to a boundary of rounding must exceed the differences between passes


@dataclass(frozen=True)
class CodedImage:
    """A file, and how it came about.

    file     its parts
    nats     -log p of the codes under the prior in float64
    bits     what they cost by their frequencies, which are p rounded
    margin   how far each logit is from where rounding would change, in nats
    noise    by how much the logits of the codes differ in the pass that decoded the file again; None: it was not
    """

    file: CodedFile
    nats: float
    bits: float
    margin: float
    noise: float | None

    @property
    def is_certain(self) -> bool:
        """Whether passes that differ as the two that were compared can't round a logit differently."""
        return self.noise is None or self.noise * SAFETY <= self.margin


class Codec:
    """Files of codes under a prior with an exact likelihood.

    Works on a copy of the prior in float64, on any device: the files do not depend on batches, threads, precision settings or the
    device (see prior/coding/frequencies.py). Raises InputError for a prior whose likelihood is a bound.
    """

    def __init__(
        self, model: PriorModel, tokenizer: Tokenizer, device: torch.device | str = "cpu"
    ) -> None:
        import_constriction()
        if not model.exact:
            model.predict_in_turn(1, None)  # raises the sentence
        self.hashes = tokenizer.fingerprint_codes(), hash_weights(model)
        self.model = deepcopy(model).to(device).eval().double()
        self.device = torch.device(device)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """The shape of an image's codes, as the tokenizer has it."""
        shape = self.model.code_shape
        return shape if shape[2] > 1 else shape[:2]

    @torch.no_grad()
    def compress(
        self, codes: Tensor, labels: Tensor | None = None, verify: bool = True
    ) -> list[CodedImage]:
        """Codes (n, *code_shape) and labels (n, ...) as for the model -> a file of each image.

        With `verify` each file is decoded again, code by code, and compared. Raises InputError if that gives other codes.
        """
        flat = codes.flatten(1).long().cpu()
        written: list[CodedImage] = []
        own_logits: list[Tensor] = []
        most = max(1, MAX_CODED_LOGITS // (self.model.L * self.model.K))
        for first in range(0, len(flat), most):
            part = slice(first, first + most)
            images, logits = self._write(flat[part], None if labels is None else labels[part])
            written += images
            own_logits += logits
        if not verify:
            return written
        read, again_logits = self._read([image.file for image in written])
        differences = (torch.stack(own_logits) - again_logits).abs().amax(1).tolist()
        verified = [
            replace(image, noise=noise) for image, noise in zip(written, differences, strict=True)
        ]
        for row, again, image in zip(flat, read, verified, strict=True):
            if again is None or not torch.equal(row, again) or not image.is_certain:
                raise InputError(
                    f"{type(self.model).__name__} computes other logits code by code than all at once (they differ by "
                    f"{image.noise:.1e} in float64), so its files could not be read; it must compute in the type of its weights"
                )
        return verified

    def _write(self, codes: Tensor, labels: Tensor | None) -> tuple[list[CodedImage], list[Tensor]]:
        """The files of codes (n, L) by one pass, and the logits (L,) of each image's codes."""
        written: list[CodedImage] = []
        own_logits: list[Tensor] = []
        with without_autocast(self.device):
            on_device = None if labels is None else labels.to(self.device)
            with RoundingWatch() as watch:
                prediction = self.model.judge(codes.to(self.device), on_device)
            for i, row in enumerate(codes):
                with watch:
                    logits = prediction.head.logits(prediction.features[i : i + 1])[0].cpu()
                if watch.rounded_to or logits.dtype != torch.float64:
                    raise InputError(
                        f"{type(self.model).__name__} rounds to {watch.rounded_to or logits.dtype} where it should compute in "
                        "the type of its weights, so its files could not be read on other machines; use at_least_float32 in "
                        "place of .float()"
                    )
                own = logits.gather(1, row[:, None])[:, 0]
                nats = float((logits.logsumexp(1) - own).sum())
                scaled = scale_logits(logits.numpy())
                phase, margin = choose_phase(scaled)
                writer = CodeWriter()
                writer.write(row.numpy(), weigh(scaled, phase))
                label = None if labels is None else labels[i].cpu()
                file = CodedFile.make(*self.hashes, phase, label, writer.finish(), row)
                written.append(CodedImage(file, nats, writer.bits, margin, None))
                own_logits.append(own)
        return written, own_logits

    @torch.no_grad()
    def decompress(self, files: Sequence[CodedFile]) -> list[Tensor | None]:
        """The codes (*code_shape) int64 of each file; None for one that is damaged.

        Raises InputError for files of another prior or tokenizer; `check` has a sentence for each.
        """
        for file in files:
            self.check(file)
        read, _ = self._read(files)
        return [None if codes is None else codes.view(self.code_shape) for codes in read]

    def check(self, file: CodedFile, name: str = "this file") -> None:
        """Raise InputError, with `name` in its sentence, for a file of another tokenizer, prior or kind of label."""
        tokenizer, prior = self.hashes
        if file.tokenizer != tokenizer:
            raise InputError(
                f"{name} has codes of the tokenizer {file.tokenizer}, and this one is {tokenizer}; give the prior that wrote it"
            )
        if file.prior != prior:
            raise InputError(
                f"{name} was written under the prior {file.prior}, and this one is {prior}; give the run that wrote it, with the "
                "checkpoint of then"
            )
        if not self._takes(file.unpack_label()):
            raise InputError(
                f"{name} has a label that this prior does not take, so it is damaged; get it again"
            )

    def _takes(self, label: Tensor | None) -> bool:
        """Whether a label (size,) of a file is one of the model's."""
        if label is None:
            return True
        blank, front = self.model.blank_labels(1), self.model.front
        if blank is None or blank[0].numel() != label.numel() or blank.dtype != label.dtype:
            return False
        most = self.model.classes if front is None else front.K
        return label.is_floating_point() or int(label.max()) < most

    def _read(self, files: Sequence[CodedFile]) -> tuple[list[Tensor | None], Tensor]:
        """The codes (L,) of each file, None for a damaged one, and the logits (n, L) of all codes that were read."""
        n = len(files)
        labels = self._stack_labels(files)
        readers: list[CodeReader | None] = [CodeReader(file.payload) for file in files]
        phases = np.array([file.phase for file in files], dtype=np.int64)[:, None, None]
        codes: list[IntArray] = []
        own: list[Tensor] = []
        with without_autocast(self.device):
            predictions = self.model.predict_in_turn(n, labels)
            logits = next(predictions)
            while True:
                drawn = self._read_part(readers, logits.cpu(), phases)
                codes.append(drawn)
                own.append(logits.cpu().gather(2, torch.from_numpy(drawn)[..., None])[..., 0])
                try:
                    logits = predictions.send(torch.from_numpy(drawn).to(self.device))
                except StopIteration:
                    break
        whole = torch.from_numpy(np.concatenate(codes, 1))
        sound = [
            row if reader is not None and file.sum_up(row) == file.checksum else None
            for row, reader, file in zip(whole, readers, files, strict=True)
        ]
        return sound, torch.cat(own, 1)

    def _read_part(
        self, readers: list[CodeReader | None], logits: Tensor, phases: IntArray
    ) -> IntArray:
        """The next codes (n, m) of all images, by their logits (n, m, K)."""
        n, _, K = logits.shape
        columns: list[IntArray] = []
        is_sound = logits.amax(2).isfinite().all(1)  # or its label is damaged
        logits = logits.where(is_sound[:, None, None], 0)
        readers[:] = [
            reader if sound else None
            for reader, sound in zip(readers, is_sound.tolist(), strict=True)
        ]
        for part in logits.split(max(1, MAX_CODED_LOGITS // (n * K)), 1):
            weights = weigh(scale_logits(part.numpy()), phases)
            columns += [read_codes(readers, weights[:, j]) for j in range(part.shape[1])]
        return np.stack(columns, 1)

    def _stack_labels(self, files: Sequence[CodedFile]) -> Tensor | None:
        """The labels (n, ...) of files, in the form that the model takes; None for a model without."""
        labels = self.model.blank_labels(len(files))
        if labels is None:
            return None
        for i, file in enumerate(files):
            if (label := file.unpack_label()) is not None:
                labels[i] = label.view(labels[i].shape)
        return labels.to(self.device)
