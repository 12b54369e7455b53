"""The table of scores, their values with provenance, and which of them may be compared.

Imports no torch: reports read scores without it.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from codegrid.engine.aliases import upgrade_names
from codegrid.engine.errors import InputError
from codegrid.engine.figures import explain_non_finite
from codegrid.engine.packages import package_version

# The squared error that no image is credited with less than, in squared levels of its pixels: the variance of rounding to whole
# levels (Bennett 1948, Spectra of quantized signals, section 2), which is in every image already. So an image that is
# reproduced without error, such as a blank one, has 58.92 dB with 8 bits a channel instead of infinitely many.
LEAST_SQUARED_ERROR = 1 / 12

# Settings of a sampler that do not change the distribution of its samples; no provenance has them.
SAME_SAMPLES = ("compile", "parallel")
USUAL_PIXELS = {"range": [0, 255], "depth": 8}  # what a provenance says of 8-bit images

STAGE1 = ("vqgan",)
STAGE2 = ("prior",)
BOTH = ("vqgan", "prior")


@dataclass(frozen=True)
class Score:
    """One line of the table of scores.

    `better` is 1 where higher is better, -1 where lower is, 0 where neither holds. `group` names the computation that the
    score comes from. A score with `proxy_decimals` is computed in the features of every extractor, under its name plus the
    extractor's suffix. `in_tables`: reports have a column for it. `in_pipeline`: stage=pipeline repeats it in its result.
    `frechet`: a Fréchet distance to the reference, which is also reported relative to that of real images.
    """

    label: str
    unit: str
    decimals: int
    better: int
    meaning: str
    stages: tuple[str, ...]
    group: str
    proxy_decimals: int | None = None
    in_tables: bool = True
    in_pipeline: bool = True
    frechet: bool = False

    @property
    def axis(self) -> str:
        """The label of a chart's axis."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def summary(self) -> str:
        """Unit, direction and meaning in one line."""
        direction = {1: "higher is better", -1: "lower is better", 0: ""}[self.better]
        head = ", ".join(part for part in (self.unit, direction) if part)
        return "; ".join(part for part in (head, self.meaning) if part)


def _with_ratios(table: Mapping[str, Score]) -> dict[str, Score]:
    """The table with lines below each Fréchet distance: that of real images, their ratio, and, of a distance that has a proxy, its
    mean over networks."""
    whole: dict[str, Score] = {}
    for name, score in table.items():
        whole[name] = score
        if not score.frechet:
            continue
        label, other = score.label, replace(score, frechet=False)
        whole[f"{name}_real"] = replace(
            other,
            label=f"Real images' {label}",
            better=0,
            meaning="the same distance of as many images of the other split",
            in_tables=False,
            in_pipeline=False,
        )
        whole[ratio_name(name)] = replace(
            other,
            label=f"{label} ratio",
            decimals=3,
            meaning=f"{label} relative to that of as many real images; 1 is as far as those are",
        )
        if score.proxy_decimals is None:
            continue
        whole[mean_ratio_name(name)] = replace(
            other,
            label=label.replace("FID", "FDr"),
            decimals=3,
            meaning=f"mean {label} ratio over networks, without the proxy",
            group="networks",
            proxy_decimals=None,
        )
    return whole


def ratio_name(name: str) -> str:
    """The name of the ratio of a Fréchet distance to that of real images: rfid_ratio_proxy of rfid_proxy."""
    stem, proxy, _ = name.partition("_proxy")
    return f"{stem}_ratio{proxy}"


def mean_ratio_name(name: str) -> str:
    """The name of the mean over networks of a Fréchet distance's ratios: rfdr of rfid."""
    return name.replace("fid", "fdr")


def _with_proxies(table: Mapping[str, Score]) -> dict[str, Score]:
    """The table with a line for the proxy's features below each score that is computed in features."""
    whole: dict[str, Score] = {}
    for name, score in table.items():
        whole[name] = score
        if score.proxy_decimals is not None:
            label = f"{score.label} proxy"
            whole[f"{name}_proxy"] = replace(score, label=label, decimals=score.proxy_decimals)
    return whole


# THE table: every list of scores in the program is derived from it, and reports have their columns in its order.
# A new score is one line here, and its computation, which adds it to a ScoreSheet under the same name.
SCORES = _with_proxies(_with_ratios({
    #                    label, unit, decimals, better, meaning, stages, group
    "K":                 Score("K", "codes", 0, 0, "size of the codebook", BOTH, "setting", in_pipeline=False),
    "psnr":              Score("PSNR", "dB", 2, 1, "mean over images of each image's PSNR", STAGE1, "pixels"),
    "ssim":              Score("SSIM", "", 3, 1, "1 for identical images", STAGE1, "pixels"),
    "ms_ssim":           Score("MS-SSIM", "", 3, 1, "1 for identical images", STAGE1, "pixels"),
    "lpips":             Score("LPIPS", "", 3, -1, "perceptual distance to the image", STAGE1, "pixels"),
    "l1":                Score("L1", "", 4, -1, "mean absolute error of pixels in [0, 1]", STAGE1, "pixels", in_pipeline=False),
    "l2":                Score("L2", "", 4, -1, "mean squared error of pixels in [0, 1]", STAGE1, "pixels", in_pipeline=False),
    "rfid":              Score("rFID", "", 2, -1, "Fréchet distance of reconstructions to images", STAGE1, "distance", 3,
                               frechet=True),
    "kid":               Score("KID", "", 4, -1, "kernel distance; may be slightly negative", BOTH, "distance", 4),
    "mind":              Score("MIND", "", 2, -1, "sliced Wasserstein distance, for few images", BOTH, "distance", 3),
    "pfid":              Score("pFID", "", 2, -1, "as rFID, from codes of which a share is perturbed", STAGE1, "perturbed", 3,
                               frechet=True),
    "sharpness":         Score("Sharpness", "", 3, 0, "gradient energy relative to the images; 1 is as sharp", STAGE1, "pixels",
                               in_pipeline=False),
    "valid_reconstructions": Score("Valid reconstructions", "", 3, 1, "share that data=shapes could have painted", STAGE1,
                               "validity"),
    "perplexity":        Score("Perplexity", "codes", 1, 0, "equally frequent codes that have this entropy", BOTH, "codes"),
    "entropy_bits":      Score("Entropy", "bits", 2, 0, "entropy of the codes per position", STAGE1, "codes"),
    "codes_used":        Score("Codes used", "", 0, 0, "codes that occur at least once", STAGE1, "codes"),
    "usage":             Score("Usage", "", 3, 0, "share of the codebook that occurs at least once", STAGE1, "codes"),
    "probe_top1":        Score("Probe", "", 3, 1, "share of labels that a linear classifier gets right", STAGE1, "probe"),
    "probe_top1_pixels": Score("Probe of pixels", "", 3, 0, "the same of the images' pixels", STAGE1, "probe", in_tables=False,
                               in_pipeline=False),
    "probe_top1_majority": Score("Most frequent label", "", 3, 0, "share of images of the label most frequent in training",
                               STAGE1, "probe", in_tables=False, in_pipeline=False),
    "bits_per_image":    Score("Rate", "bits/image", 0, 0, "", BOTH, "rate"),
    "compression_ratio": Score("Compression", "×", 1, 0, "pixels relative to the codes", STAGE1, "rate"),
    "gfid":              Score("gFID", "", 2, -1, "Fréchet distance of samples to images", STAGE2, "distance", 3, frechet=True),
    "inception_score":   Score("Inception Score", "", 2, 1, "confident and varied class predictions", STAGE2, "variety", 2),
    "precision":         Score("Precision", "", 3, 1, "share of samples close to an image", STAGE2, "variety", 3),
    "recall":            Score("Recall", "", 3, 1, "share of images close to a sample", STAGE2, "variety", 3),
    "density":           Score("Density", "", 3, 1, "samples around each image; 1 matches the images", STAGE2, "variety", 3),
    "coverage":          Score("Coverage", "", 3, 1, "share of images with a sample nearby", STAGE2, "variety", 3),
    "chd":               Score("CHD", "", 3, -1, "distance of code histograms of samples and images", STAGE2, "histogram"),
    "chd_mixed":         Score("CHD, mixed", "", 3, 0, "the same between halves of both sets mixed at random", STAGE2, "histogram",
                               in_tables=False, in_pipeline=False),
    "adm_fid":           Score("ADM FID", "", 2, -1, "Fréchet distance to the reference", BOTH, "adm", in_pipeline=False,
                               frechet=True),
    "adm_sfid":          Score("ADM sFID", "", 2, -1, "the same of features that have places", BOTH, "adm", in_pipeline=False,
                               frechet=True),
    "adm_inception_score": Score("ADM Inception Score", "", 2, 1, "confident and varied class predictions", BOTH, "adm",
                                 in_pipeline=False),
    "adm_precision":     Score("ADM precision", "", 3, 1, "share near an image of the reference", BOTH, "adm", in_pipeline=False),
    "adm_recall":        Score("ADM recall", "", 3, 1, "share of the reference near an image", BOTH, "adm", in_pipeline=False),
    "valid_samples":     Score("Valid samples", "", 3, 1, "share that data=shapes could have painted", STAGE2, "validity"),
    "empty_samples":     Score("Empty samples", "", 3, -1, "share that is background alone", STAGE2, "validity"),
    "nats_per_token":    Score("Nats per token", "", 3, -1, "negative log likelihood of a code", STAGE2, "likelihood"),
    "bits_per_image_deviation": Score("Rate deviation", "bits/image", 0, 0, "standard deviation over images", STAGE2, "likelihood",
                                      in_tables=False, in_pipeline=False),
    "nearest_rmse":      Score("Nearest RMSE", "of 255", 1, 0, "median distance of samples to their nearest training image", STAGE2,
                               "neighbours", in_tables=False, in_pipeline=False),
    "nearest_rmse_val":  Score("Nearest RMSE, validation", "of 255", 1, 0, "the same for validation images", STAGE2, "neighbours",
                               in_tables=False, in_pipeline=False),
    "nearest_ratio":     Score("Nearest ratio", "", 3, 0, "near 0 for copies of training images", STAGE2, "neighbours"),
    "nearest_ratio_val": Score("Nearest ratio, validation", "", 3, 0, "the same for validation images", STAGE2, "neighbours",
                               in_tables=False, in_pipeline=False),
    "seconds":           Score("Training", "s", 0, 0, "", BOTH, "training", in_pipeline=False),
    "images_per_second": Score("Speed", "images/s", 0, 0, "", BOTH, "training", in_pipeline=False),
}))  # fmt: skip


# Why a score is no number, where more is known than that.
UNDEFINED = {
    "sharpness": "the images have no gradients (each is of one colour), or the reconstructions are NaN",
    "ssim": "the images have sides of fewer than 6 pixels, too few for its window of 11, or the reconstructions are NaN",
}


CURVE_SCORES = ("psnr", "ssim", "rfid_proxy")  # of a run at its rates, beside bits per image


def names_in_group(group: str) -> list[str]:
    """The names of a group's scores, without those in the proxy's features."""
    return [
        name
        for name, score in SCORES.items()
        if score.group == group and not name.endswith("_proxy")
    ]


def pipeline_names(stage: str) -> list[str]:
    """The scores that stage=pipeline repeats; where both stages have one of a name, the tokenizer's counts."""
    owners = {name: score.stages[0] for name, score in SCORES.items() if score.in_pipeline}
    return [name for name, owner in owners.items() if owner == stage]


def find_score(name: str) -> Score | None:
    """The line of the table for a score's name, also with the suffix of an extractor: rfid_my_network."""
    if name in SCORES:
        return SCORES[name]
    stems = [stem for stem in SCORES if name.startswith(f"{stem}_")]
    return SCORES[max(stems, key=len)] if stems else None


def find_ambiguous(suffix: str) -> str | None:
    """A score in features whose name with this suffix is, or reads as, that of another score; None if there is none."""
    in_features = [name for name, score in SCORES.items() if score.proxy_decimals is not None]
    clashes = (name + suffix for name in in_features if find_score(name + suffix) != SCORES[name])
    return next(clashes, None)


def max_psnr(depth: int) -> float:
    """The PSNR in dB of an image without error, of pixels of this many bits."""
    return 10 * math.log10((2**depth - 1) ** 2 / LEAST_SQUARED_ERROR)


def describe_floor(depth: int) -> dict[str, str]:
    """What the provenance of a PSNR says about its floor, for pixels of this many bits."""
    most = f"at most {max_psnr(depth):.2f} dB an image"
    return {"floor": f"squared error of 1/12 of a level, {most}"}


def write_range(limits: Sequence[Any]) -> str:
    """The range of a provenance in words: 0 to 4,095; where channels differ, those of the first three."""
    pairs = limits if isinstance(limits[0], Sequence) else [limits]
    texts = [f"{low:,.6g} to {high:,.6g}" for low, high in pairs[:3]]
    more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    return ", ".join(texts) + more


def name_channels(numbers: Sequence[int]) -> str:
    """Channels by their numbers: channel 1, or channels 3, 2, 1."""
    return f"channel{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def refer_to(score: Score, about: Mapping[str, Any]) -> Score:
    """The line of a score with what a provenance says it refers to: the range of the pixels, the most that it can be, and the
    bits of a pixel."""
    unit, meaning = score.unit, score.meaning
    if unit == "dB" and "range" in about:
        unit = f"dB of the range {write_range(about['range'])}"
        meaning += f", at most {max_psnr(about['depth']):.2f}"
    if "pixel_bits" in about:
        meaning = meaning.replace("pixels", f"pixels of {about['pixel_bits']} bits")
    return replace(score, unit=unit, meaning=meaning)


EvaluationResult = Mapping[str, Any]  # the content of metrics.json of stage=evaluate


def library_versions(*packages: str) -> str:
    """Names and versions, without the local part of a version, which names the build's platform."""
    versions = {package: package_version(package) or "unknown" for package in packages}
    return ", ".join(f"{package} {text.split('+')[0]}" for package, text in versions.items())


@dataclass
class ScoreSheet:
    """Values of scores by name, each with its provenance, or None and the reason why it is absent.

    `common` is the part of the provenance that all scores share. `intervals` are the 95% intervals of scores that have one.
    """

    common: Mapping[str, Any]
    values: dict[str, float | int | bool | None] = field(default_factory=dict)
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float, **provenance: Any) -> None:
        """Add a score, rounded to five significant digits. One that is no finite number is absent."""
        if math.isfinite(value):
            self.values[name] = value if isinstance(value, int) else float(f"{value:.5g}")
            self.provenance[name] = {**self.common, **provenance}
        else:
            self.mark_absent(name, UNDEFINED.get(name) or explain_non_finite(value))

    def share(self, *keys: str) -> "ScoreSheet":
        """The same sheet for scores whose provenance shares these keys only."""
        return replace(self, common={key: self.common[key] for key in keys if key in self.common})

    def add_interval(self, name: str, ends: tuple[float, float] | None) -> None:
        """Add the 95% interval of a score that is there; None adds nothing."""
        if ends is not None and self.values[name] is not None:
            self.intervals[name] = [float(f"{end:.5g}") for end in ends]

    def mark_absent(self, name: str, reason: str) -> None:
        self.values[name] = None
        self.absent[name] = reason

    def describe(self) -> dict[str, dict[str, Any]]:
        """What metrics.json holds besides the values: the reasons why scores are absent, the provenance of the others, and the
        intervals of some."""
        return {
            "absent": self.absent,
            "provenance": self.provenance,
            "intervals": self.intervals,
        }


def upgrade_provenance(
    provenance: Mapping[str, Mapping[str, Any]], pixels: Mapping[str, Any] = USUAL_PIXELS
) -> dict[str, dict[str, Any]]:
    """The provenance of an evaluation's scores with what earlier versions left out.

    They had no floor of the error. An image without error made their mean infinite, so a PSNR that is a number is of images
    with errors, and those of reconstructions are far above the floor. Their pixels had 8 bits a channel; `pixels` are the depth
    and the range, which they did not state. A sampler's settings that change no distribution are left out, since `upgrade_names`
    adds them to what is read from a file.
    """
    upgraded = {name: dict(about) for name, about in provenance.items()}
    for about in upgraded.values():
        if isinstance(sampler := about.get("sampler"), Mapping):
            about["sampler"] = {k: v for k, v in sampler.items() if k not in SAME_SAMPLES}
    for name in names_in_group("pixels"):
        if name in upgraded:
            upgraded[name] = {**pixels, **upgraded[name]}
    if "psnr" in upgraded:
        floor = describe_floor(upgraded["psnr"]["depth"])["floor"]
        upgraded["psnr"].setdefault("floor", floor)
    if "size" in (about := upgraded.get("compression_ratio", {})):
        about.setdefault("pixel_bits", 8 * about["size"][0])
    return upgraded


def check_comparable(name: str, results: Sequence[EvaluationResult]) -> None:
    """Raise InputError if the score `name` is absent from a result, or if two results differ in its provenance."""
    for result in results:
        run = result.get("run", "a run")
        if result.get(name) is None:
            reason = result.get("absent", {}).get(name, "it was not computed")
            raise InputError(f"{name} of {run} is absent: {reason}")
        if name not in result.get("provenance", {}):
            raise InputError(
                f"{name} of {run} carries no provenance; compare what stage=evaluate writes"
            )
    first, *others = results
    pixels = find_8_bit_pixels(result["provenance"][name] for result in results)
    mine = upgrade_provenance(first["provenance"], pixels)[name]
    for other in others:
        theirs = upgrade_provenance(other["provenance"], pixels)[name]
        for key in {**mine, **theirs}:
            if mine.get(key) != theirs.get(key):
                raise InputError(
                    f"{name} of {first.get('run')} and of {other.get('run')} can't be compared: {key} is {mine.get(key)} of the "
                    f"one and {theirs.get(key)} of the other; evaluate both alike"
                )


def find_8_bit_pixels(provenance: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The depth and the range of the first of several provenances that states them and has 8 bits.

    Results of earlier versions have these too if they are of the same images, which the hash of the pixels tells.
    """
    stated = (
        {"range": about["range"], "depth": 8} for about in provenance if about.get("depth") == 8
    )
    return next(stated, USUAL_PIXELS)


def score_difference(name: str, one: EvaluationResult, other: EvaluationResult) -> float:
    """The score `name` of one evaluation minus that of another; InputError if they are not comparable."""
    check_comparable(name, [one, other])
    return float(one[name]) - float(other[name])


def read_result(folder: str, of_stage: str) -> dict[str, Any]:
    """metrics.json of a run folder of stage=evaluate that evaluated a run of `of_stage`; InputError if there is none."""
    file = Path(folder).expanduser() / "metrics.json"
    try:
        result = upgrade_names(
            json.loads(file.read_text())
        )  # settings of samplers have today's names
    except (OSError, ValueError) as error:
        raise InputError(
            f"compare_to={folder} has no metrics.json to read; give a run folder of stage=evaluate"
        ) from error
    if not isinstance(result, dict) or result.get("of_stage") != of_stage:
        of = "samples in a file" if of_stage == "samples" else f"a run of stage={of_stage}"
        raise InputError(
            f"compare_to={folder} is no evaluation of {of}, as this one is; give one that is"
        )
    return result
