"""How an object gets into a file and back, strictly and safely."""

import math
import os
import pickle
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from data.datamodule import ImageDataModule
from data.errors import InputError
from vqgan.clock import Clocked
from vqgan.decoder import Decoder
from vqgan.encoder import Encoder
from vqgan.quantizers.base import Quantizer
from vqgan.tokenizer import Tokenizer
from vqgan.trust import trusted

Built = TypeVar("Built")
FORMAT = 1  # raise it when an older program could not read the file
AVERAGE = "average"  # the key of the averaged weights
LAST = Path("checkpoints") / "last.ckpt"  # to go on with
BEST = Path("checkpoints") / "best.ckpt"  # to be used, where a run looks for it


def find(ckpt: str | Path) -> Path:
    """The checkpoint file of a run folder, the best where it is kept, or the file itself."""
    path = Path(ckpt).expanduser()
    file = path if not path.is_dir() else path / BEST if (path / BEST).is_file() else path / LAST
    if not file.is_file():
        raise InputError(
            f"ckpt={ckpt} has no checkpoint ({file} is missing); give a run folder such as runs/vqgan/shapes, or a file"
        )
    return file


def read(ckpt: str | Path, *stages: str) -> dict[str, Any]:
    """A checkpoint of one of these stages as plain containers and tensors on the CPU; reading it runs no code of the file."""
    file, wanted = find(ckpt), " or ".join(f"stage={stage}" for stage in stages)
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        header = checkpoint["codegrid"]
    except (KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{file} is damaged or no checkpoint of Codegrid; give a run folder of {wanted}") from error
    if header["format"] > FORMAT:
        raise InputError(f"{file} has format {header['format']}, this program reads up to {FORMAT}; update Codegrid")
    if header["stage"] not in stages:
        raise InputError(f"{file} comes from stage={header['stage']}, and a checkpoint of {wanted} is needed")
    return checkpoint


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


def save_whole(content: Any, file: Path) -> None:
    """torch.save that leaves either the complete new file or the old one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    with temporary.open("wb") as opened:
        torch.save(content, opened)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(temporary, file)


class Checkpoints(Callback):
    """Writes checkpoints/last.ckpt every `every` of the module's own steps, at the end, and when a run breaks off.

    Also keeps the state of the random streams, which Lightning leaves out, and the run's header. A validation that a run
    breaks off in, or before, is made up for when it is resumed.
    """

    def __init__(self, folder: Path, header: dict[str, Any], every: int) -> None:
        self.file, self.header, self.every = folder / LAST, header, every
        self._random: dict[str, Any] = {}
        self._judged = 0  # the step of the last validation that came to its end

    def save(self, trainer: L.Trainer) -> None:
        module = trainer.lightning_module
        assert isinstance(module, Clocked)
        module.check()  # a broken model must not take a good one's place
        content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if trainer.is_global_zero:
            save_whole(content, self.file)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        assert isinstance(module, Clocked)
        if module.step % self.every == 0 and not trainer.should_stop:
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Clocked)
        self._judged = module.step
        if trainer.state.fn == "fit" and module.step % self.every == 0 and not trainer.should_stop:
            self.save(trainer)  # again, now with what the validation has told

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.save(trainer)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        assert isinstance(module, Clocked)
        if module.step and trainer.state.fn == "fit" and module.broken < 0:
            self.save(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(module, Clocked)
        checkpoint["codegrid"] = self.header
        checkpoint["unjudged"] = module.step % (trainer.val_check_batch or math.inf) == 0 and self._judged != module.step
        checkpoint["random"] = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._random = checkpoint["random"]
        if checkpoint.get("unjudged"):  # by itself Lightning leaves the validation out, or takes half of it for the whole
            fit = checkpoint["loops"]["fit_loop"]
            for count in ("total", "current"):
                trained, judged = (fit[f"epoch_loop.{loop}batch_progress"][count] for loop in ("", "val_loop."))
                trained["completed"] = trained["processed"]
                judged.update(ready=1, started=1, processed=0, completed=0)  # in the middle of its first batch

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._random:  # as late as possible: building loaders and validating draw numbers too
            torch.set_rng_state(self._random["cpu"])
            if len(self._random["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(self._random["cuda"])


class Best(Callback):
    """Keeps in checkpoints/best.ckpt the weights with the lowest `figure` that a validation found.

    `figures` are what that validation found, all of it, and `step` when. The weights are those that it used: this callback
    goes before one that takes an average out again. A resumed run goes on with the file that it finds.
    """

    def __init__(self, folder: Path, header: dict[str, Any], figure: str) -> None:
        self.file, self.header, self.figure = folder / BEST, header, figure
        self.lowest, self.step, self.figures = math.inf, 0, dict[str, float]()
        if self.file.is_file():
            kept = read(self.file, header["stage"])
            self.lowest, self.step, self.figures = kept["lowest"], kept["clock"]["step"], kept["figures"]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Clocked)
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if found[self.figure] >= self.lowest or not math.isfinite(found[self.figure]):
            return
        self.lowest, self.step = found[self.figure], module.step
        self.figures = {name.removeprefix("val/"): round(value, 4) for name, value in found.items()}
        if trainer.is_global_zero:
            content = {"codegrid": self.header, "state_dict": module.state_dict(), "lowest": self.lowest, "figures": self.figures}
            save_whole(content | {"clock": {"step": module.step, "seconds": module.seconds}}, self.file)
