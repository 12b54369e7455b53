"""The settings of stage=evaluate, typed and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from codegrid.engine.errors import InputError, check_int, check_range
from codegrid.engine.precision import autocast

EVALUATION_SPLITS = ("val", "train")

EVALUATION_PRECISIONS = ("32-true", "auto")

# How pixels in [0, 255] become whole numbers: ADM and taming cut them off.
ROUNDINGS = ("nearest", "truncate")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated and how, as conf/stage/evaluate.yaml describes it. Raises InputError for values that can't work."""

    device: torch.device
    ckpt: str
    id: str | None
    seed: int
    split: str
    compare_to: str | None
    inception: bool
    proxy: int
    networks: Mapping[str, Mapping[str, Any]]
    features: str | None
    features_dir: str | None
    lpips: str | None
    fetch: bool
    ratios: bool
    references: bool
    rates: bool | Sequence[int]
    perturb: float
    perturb_nearest: int
    probe: int
    samples: int | str
    reference: str | None
    rounding: str | None
    neighbours: bool
    validity: int
    precision: str
    show: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.split not in EVALUATION_SPLITS:
            raise InputError(f"split={self.split} must be one of {', '.join(EVALUATION_SPLITS)}")
        if self.precision not in EVALUATION_PRECISIONS:
            raise InputError(
                f"precision={self.precision} must be one of {', '.join(EVALUATION_PRECISIONS)}"
            )
        if self.features_dir is not None and not Path(self.features_dir).expanduser().is_dir():
            raise InputError(
                f"features_dir={self.features_dir} is no folder; give one that holds files of weights"
            )
        if not isinstance(self.rates, bool):
            for n in list_numbers(self.rates):
                check_int("rates", n, 1)
        check_range("perturb", self.perturb, 0, 1)
        check_int("perturb_nearest", self.perturb_nearest, 1, "code")
        check_int("probe", self.probe, 0, "images")
        check_int("show", self.show, 1, "image")
        check_int("batch_size", self.batch_size, 1, "image")
        check_int("proxy", self.proxy, 0, "steps")
        check_int("validity", self.validity, 0, "images")
        if isinstance(self.samples, str):
            if self.rounding not in (None, *ROUNDINGS):
                raise InputError(
                    f"rounding={self.rounding} must be one of {', '.join(ROUNDINGS)}, or null if it is not known"
                )
            return
        check_int("samples", self.samples, 0, "samples")
        if self.rounding is not None:
            raise InputError(
                f"rounding={self.rounding} is of the pixels in samples=<npz>, and here the samples are drawn; leave it out"
            )

    @classmethod
    def read(cls, settings: Mapping[str, Any], device: torch.device) -> "EvaluationSettings":
        """The settings in a stage's config, which has others too."""
        names = [field.name for field in fields(cls) if field.name != "device"]
        return cls(device, **{name: settings[name] for name in names})

    @property
    def number_of_samples(self) -> int:
        """How many samples of a prior are drawn."""
        return 0 if isinstance(self.samples, str) else self.samples

    def autocast(self) -> torch.autocast:
        """A new context with the precision that models run in.

        The default is float32, whose results depend little on the machine.
        """
        if self.precision == "auto":
            return autocast(self.device)
        return torch.autocast(self.device.type, enabled=False)


def list_numbers(rates: Any) -> list[Any]:
    """The numbers of a list; InputError for anything else."""
    if isinstance(rates, str) or not isinstance(rates, Sequence):
        raise InputError(f"rates={rates} must be true, false, or numbers of codes such as [1,2,4]")
    return list(rates)
