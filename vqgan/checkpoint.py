"""How an object gets into a file and back, strictly and safely."""

import math
import os
import tempfile
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from data.datamodule import ImageDataModule
from data.errors import InputError
from data.loading import BatchDataModule
from data.terminal import spared, tell
from vqgan.clock import Clocked
from vqgan.decoder import Decoder
from vqgan.encoder import Encoder
from vqgan.quantizers.base import Quantizer
from vqgan.ranks import agreed, gathered, mine
from vqgan.series import cut
from vqgan.signals import Stop, StopNow
from vqgan.tokenizer import Tokenizer
from vqgan.trust import trusted

Built = TypeVar("Built")
FORMAT = 1  # raise it when an older program could not read the file
AVERAGE = "average"  # the key of the averaged weights
LAST = Path("checkpoints") / "last.ckpt"  # to go on with
PREVIOUS = Path("checkpoints") / "previous.ckpt"  # the one before, for when the last is damaged
BEST = Path("checkpoints") / "best.ckpt"  # to be used, where a run looks for it
PAUSES = (10, 30, 60, 120, 240)  # seconds between tries to write the last state of a run


def candidates(ckpt: str | Path) -> list[Path]:
    """The checkpoint files of a run folder that there are, the best before the last and its predecessor, or the file itself."""
    path = Path(ckpt).expanduser()
    wanted = [path / BEST, path / LAST, path / PREVIOUS] if path.is_dir() else [path]
    found = [file for file in wanted if file.is_file()]
    if not found:
        file = path / LAST if path.is_dir() else path
        raise InputError(
            f"ckpt={ckpt} has no checkpoint ({file} is missing); give a run folder such as runs/vqgan/shapes, or a file"
        )
    return found


def find(ckpt: str | Path) -> Path:
    """The checkpoint file of a run folder, the best where it is kept, or the file itself."""
    return candidates(ckpt)[0]


def damage(file: Path) -> str | None:
    """What is wrong with a file that torch.save has written: it is a zip with a checksum of each part, at which torch.load
    does not look."""
    try:
        with zipfile.ZipFile(file) as parts:
            wrong = parts.testzip()
        return wrong and f"the checksum of {wrong} is wrong"
    except Exception as error:  # damage can make a reader stumble over anything
        return f"{type(error).__name__}: {error}"


def read(ckpt: str | Path, *stages: str) -> dict[str, Any]:
    """A checkpoint of one of these stages as plain containers and tensors on the CPU; reading it runs no code of the file.

    Of a run folder the next file is taken where one is damaged, which is said."""
    wanted = " or ".join(f"stage={stage}" for stage in stages)
    files = candidates(ckpt)
    sound = next((file for file in files if damage(file) is None), None)
    if sound is None:
        raise InputError(f"{files[0]} is damaged or no checkpoint of Codegrid; give a run folder of {wanted}")
    if sound != files[0]:
        tell(f"{files[0]} is damaged ({damage(files[0])}): {sound} is used in its place")
    try:
        checkpoint: dict[str, Any] = torch.load(sound, map_location="cpu", weights_only=True)
        header = checkpoint["codegrid"]
    except Exception as error:  # of what can be in a file that is not ours, no list is complete
        raise InputError(f"{sound} is damaged or no checkpoint of Codegrid; give a run folder of {wanted}") from error
    if header["format"] > FORMAT:
        raise InputError(f"{sound} has format {header['format']}, this program reads up to {FORMAT}; update Codegrid")
    if header["stage"] not in stages:
        raise InputError(f"{sound} comes from stage={header['stage']}, and a checkpoint of {wanted} is needed")
    return checkpoint


def to_go_on(folder: Path) -> Path:
    """The checkpoint that a run goes on from: the last, or the one before where it is missing or damaged.

    A damaged one is set aside as damaged.ckpt, or the next save would take it for a good one and put it in the place of its
    predecessor."""
    last, previous = folder / LAST, folder / PREVIOUS
    wrong = damage(last) if last.is_file() else "it is missing"
    if wrong is None:
        return last
    if not previous.is_file() or damage(previous):
        if not last.is_file() and not previous.is_file():
            raise InputError(
                f"{folder} has no checkpoint to go on from, for it ended before its first; start the run again "
                "with the command in its card.md"
            )
        raise InputError(f"{last} is damaged ({wrong}), and {previous} can't take its place; start the run again")
    tell(f"{last} can't be used ({wrong}): the run goes on from {previous}")
    with suppress(FileNotFoundError):  # missing, or another process of this run was first
        os.replace(last, last.with_name("damaged.ckpt"))
    return previous


def header(stage: str, config: DictConfig) -> dict[str, Any]:
    """What makes a checkpoint speak for itself: its format, its stage and the resolved config as a plain dict."""
    return {"format": FORMAT, "stage": stage, "config": OmegaConf.to_container(config, resolve=True)}


def build(config: Any, kind: type[Built]) -> Built:
    """Instantiate a config that came from a checkpoint, a plain dict: this project's own classes and nothing else; what comes
    of it must be of this kind."""
    if isinstance(config, DictConfig):  # of the command itself, where a value may stand for another
        config = OmegaConf.to_container(config, resolve=True)
    trusted(config, "the checkpoint")
    made = instantiate(config)
    if not isinstance(made, kind):
        raise InputError(f"the checkpoint has {config['_target_']} for a {kind.__name__.lower()}; don't trust the file")
    return made


def tokenizer_from(config: Any) -> Tokenizer:
    """The tokenizer, untrained, that a config's `model` and `quantizer` describe."""
    model = config["model"]
    quantizer = build(config["quantizer"], Quantizer)  # type: ignore[type-abstract]
    return Tokenizer(build(model["encoder"], Encoder), quantizer, build(model["decoder"], Decoder), model["start"])


def part(state: dict[str, Any], name: str) -> dict[str, Any]:
    """The entries of a state dict under `name.`, without that prefix."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def load_tokenizer(ckpt: str | Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The trained tokenizer of a stage=vqgan run, the average of its weights where there is one, in eval mode, and the
    config of that run."""
    checkpoint = read(ckpt, "vqgan")
    config = checkpoint["codegrid"]["config"]
    tokenizer = tokenizer_from(config)
    try:
        tokenizer.load_state_dict(checkpoint.get(AVERAGE) or part(checkpoint["state_dict"], "tokenizer"))
    except RuntimeError as error:  # another K, a key that is missing: torch names them line by line
        told = " ".join(str(error).split()[:40])
        raise InputError(f"{find(ckpt)} is damaged: its weights are not those of its config ({told})") from error
    return tokenizer.eval(), config


def described_images(described: dict[str, Any], config: DictConfig) -> ImageDataModule:
    """The images that a tokenizer was trained on, by its `described` config, with what this run's config says of them."""
    mine = {name: value for name, value in config.data.items() if value is not None}
    if strange := set(mine) - set(described):
        raise InputError(f"data.{strange.pop()} is no setting of the tokenizer's data, which is {described['_target_']}")
    return build({**described, **mine, "cache_dir": config.cache_dir}, ImageDataModule)  # type: ignore[type-abstract]


def save_whole(content: Any, file: Path, previous: Path | None = None) -> None:
    """torch.save that leaves either the complete new file or the old one, on the disk for good; the old one may be kept.

    With `previous`, between two renames there is no `file` for a moment, but `previous` is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    try:
        with temporary.open("wb") as opened:
            torch.save(content, opened)
            opened.flush()
            os.fsync(opened.fileno())
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()  # it may be what fills the disk
        if isinstance(error, RuntimeError) and isinstance(
            error.__context__, OSError
        ):  # torch's writer stumbles on over a full disk
            raise error.__context__ from None
        raise
    if previous is not None and file.exists():
        os.replace(file, previous)
    os.replace(temporary, file)
    with suppress(OSError):  # some file systems of clusters don't sync folders
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the names may be lost with the power
        finally:
            os.close(folder)


class Checkpoints(Callback):
    """Writes checkpoints/last.ckpt every `every` of the module's own steps, at the end, and when a run breaks off between two
    of its updates; the file before is kept as previous.ckpt.

    A checkpoint is of a whole update, after its logs and its validation, so that a resumed run repeats nothing and leaves
    nothing out: files that the run adds to are cut back to the checkpoint's step. Also keeps the state of the random streams,
    which Lightning leaves out, and the run's header. A validation that a run breaks off in is made up for when it is resumed.

    Where a checkpoint can't be written the run says so, goes on, and tries again at the next; at its end for some minutes more,
    and then in the system's folder for temporary files. Only then, with its last state not where it belongs, it fails.
    """

    def __init__(self, folder: Path, header: dict[str, Any], every: int, pauses: Sequence[float] = PAUSES) -> None:
        self.file, self.header, self.every, self.pauses = folder / LAST, header, every, pauses
        self._random: list[dict[str, Any]] = []  # of each rank
        self._unjudged = False  # whether the checkpoint that was loaded lacks its validation
        self._logged: dict[str, float] = {}
        self._judged = 0  # the step of the last validation that came to its end
        self._saved = 0, 0  # the step of the last save, and the last validation then

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, BatchDataModule)
        if self.between not in data.between:
            data.between.append(self.between)

    def between(self, trainer: L.Trainer) -> None:
        """After an update with its logs and its validation, before the next; also before that validation, for it may be long."""
        module = trainer.lightning_module
        assert isinstance(module, Clocked)
        if trainer.training:  # Lightning counts a validation that it leaves out after a resume as a step of the loggers
            trainer.fit_loop.epoch_loop._batches_that_stepped = module.step
        if module.step % self.every or (module.step, self._judged) == self._saved or not module.step:
            return
        try:
            self.save(trainer)
        except OSError as error:
            kept = f"the last one is of step {self._saved[0]}" if self._saved[0] else "there is none yet"
            tell(
                f"step {module.step}: {self.file} can't be written ({error.strerror or error}); {kept}, and the run goes on and "
                f"tries again after {self.every} more steps"
            )

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.should_stop:
            self.between(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write the state as it is, or raise OSError, on all ranks: each has a part in it, and they must agree on the next try."""
        module = trainer.lightning_module
        assert isinstance(module, Clocked)
        module.check()  # a broken model must not take a good one's place
        content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if failed := agreed(lambda: self._written(content)):
            raise failed
        self._saved = module.step, self._judged

    def _written(self, content: dict[str, Any]) -> OSError | None:
        try:
            save_whole(content, self.file, self.file.with_name(PREVIOUS.name))
        except OSError as error:
            return error
        return None

    def save_at_last(self, trainer: L.Trainer, pauses: Sequence[float]) -> None:
        """Save what would otherwise be gone with this process: try again after each of the pauses, and then elsewhere."""
        for pause in (*pauses, None):
            try:
                return self.save(trainer)
            except OSError as error:
                reason = f"{self.file} can't be written ({error.strerror or error})"
            if pause is not None:
                tell(f"{reason}; the run is over and its state still in memory: another try in {pause:g} s")
                time.sleep(pause)
        own, self.file = self.file, Path(tempfile.gettempdir()) / f"codegrid-{self.header['config'].get('id')}" / LAST
        try:
            self.save(trainer)
        except OSError as error:
            raise InputError(f"{reason}, nor can {self.file} ({error.strerror or error}); the run's last state is lost") from error
        finally:
            elsewhere, self.file = self.file, own
        raise InputError(f"{reason}; the run's last state is in {elsewhere}: move it to {own}, and go on with resume=")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Clocked)
        trainer.fit_loop.epoch_loop._batches_that_stepped = module.step
        self.save_at_last(trainer, self.pauses)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        assert isinstance(module, Clocked)
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        whole = batches.completed == batches.ready and (module.step, self._judged) != self._saved
        together = isinstance(exception, Stop) or (trainer.world_size == 1 and not isinstance(exception, StopNow))
        if whole and module.step and trainer.state.fn == "fit" and module.broken < 0 and together:
            self.save_at_last(trainer, ())  # whoever ends a program has little patience

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Clocked)
        self._judged = module.step

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(module, Clocked)
        checkpoint["codegrid"] = self.header
        checkpoint["unjudged"] = module.step % (trainer.val_check_batch or math.inf) == 0 and self._judged != module.step
        checkpoint["logged"] = {name: float(value) for name, value in trainer.logged_metrics.items() if name.startswith("train/")}
        own = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
        checkpoint["random"] = gathered(own)  # every rank has streams of its own

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._random, self._unjudged = checkpoint["random"], bool(checkpoint.get("unjudged"))
        self._logged = checkpoint.get("logged", {})
        self._judged = 0 if self._unjudged else checkpoint["clock"]["step"]
        self._saved = checkpoint["clock"]["step"], self._judged
        if self._unjudged:  # by itself Lightning leaves the validation out, or takes half of it for the whole
            fit = checkpoint["loops"]["fit_loop"]
            for count in ("total", "current"):
                trained, judged = (fit[f"epoch_loop.{loop}batch_progress"][count] for loop in ("", "val_loop."))
                trained["completed"] = trained["processed"]
                judged.update(ready=1, started=1, processed=0, completed=0)  # in the middle of its first batch

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self._logged:  # in the logs a figure that is not found at every step stays until it is found again
            module.log_dict(self._logged)
            self._logged = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Clocked)
        if not self._random:
            return
        cut(trainer.loggers, module.step, self._unjudged)
        if own := mine(self._random, {}):  # else this rank is new, and has numbers that no other rank has
            torch.set_rng_state(own["cpu"])  # as late as possible: building loaders and validating draw numbers too
            if own["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(own["cuda"])


class Best(Callback):
    """Keeps in checkpoints/best.ckpt the weights with the lowest `figure` that a validation found.

    `figures` are what that validation found, all of it, and `step` when. The weights are those that it used: this callback
    goes before one that takes an average out again. A resumed run goes on with the file that it finds.
    """

    def __init__(self, folder: Path, header: dict[str, Any], figure: str) -> None:
        self.file, self.header, self.figure = folder / BEST, header, figure
        self.lowest, self.step, self.figures = math.inf, 0, dict[str, float]()
        if self.file.is_file() and (wrong := damage(self.file)):
            tell(f"{self.file} is damaged ({wrong}): the best is what the validations to come find best")
        elif self.file.is_file():
            kept = read(self.file, header["stage"])
            self.lowest, self.step, self.figures = kept["lowest"], kept["clock"]["step"], kept["figures"]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Clocked)
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if found[self.figure] >= self.lowest or not math.isfinite(found[self.figure]):
            return
        self.lowest, self.step = found[self.figure], module.step
        self.figures = {name.removeprefix("val/"): round(value, 4) for name, value in found.items()}
        state = trainer.strategy.lightning_module_state_dict()  # of all ranks' shares, where they have but these
        if trainer.is_global_zero:
            content = {"codegrid": self.header, "state_dict": state, "lowest": self.lowest, "figures": self.figures}
            with spared(self.file):
                save_whole(content | {"clock": {"step": module.step, "seconds": module.seconds}}, self.file)
