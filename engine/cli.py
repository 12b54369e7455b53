"""The command line: help, garbage collection, exit codes, and each of the user's mistakes as one sentence."""

import gc
import os
import re
import shlex
import string
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from codegrid.engine.aliases import rename_words
from codegrid.engine.choices import route_choices
from codegrid.engine.defaults import CONF
from codegrid.engine.errors import InputError, explain_import, suggest
from codegrid.engine.exit_codes import INTERRUPTED, MISTAKE, TERMINATED
from codegrid.engine.places import admit_places
from codegrid.engine.program import PROGRAM
from codegrid.engine.texts import normalise_texts
from codegrid.engine.words import is_group, prepare_words

PLUGINS = {  # options that Hydra has only if this extra is installed
    "hydra/launcher=joblib": "joblib",
    "hydra/launcher=submitit_slurm": "submitit",
    "hydra/launcher=submitit_local": "submitit",
    "hydra/sweeper=optuna": "optuna",
}


def run_command(job: Callable[[], Any]) -> None:
    """Run a command: the user's mistakes get one sentence and an exit code, ours their traceback."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(format_help())
        return
    # Exceptions arrive here whole instead of being printed by Hydra.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        sys.argv[1:] = prepare_command(sys.argv[1:])
        job()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        message = explain_error(error, list_settings)
        if message is None:
            raise
        print(message, file=sys.stderr)
        sys.exit(MISTAKE)


def prepare_command(words: Sequence[str]) -> list[str]:
    """The words of a command as Hydra takes them; earlier names are replaced, with a sentence for each."""
    current, renamed = rename_words(list(words))
    for sentence in renamed:
        print(sentence, file=sys.stderr)
    return admit_places(route_choices(prepare_words(current)))


def run_single(run: Callable[[Any], Any], config: Any) -> None:
    """A run that is no point of a sweep. Of several processes one reports the user's mistake."""
    try:
        normalise_texts(config)
        run(config)
    except SystemExit as stop:  # Lightning answers SIGTERM by an exit without a code
        raise SystemExit(TERMINATED if stop.code is None else stop.code) from stop
    except Exception as error:
        message = explain_error(error)
        if message is None:
            raise
        from codegrid.engine.distributed import (
            report_mistake,  # imports torch, which --help does without
        )

        report_mistake(message)
        sys.exit(MISTAKE)


def import_stage(path: str | None) -> Callable[[Any], Any]:
    """The function that conf/stage names."""
    if path is None:
        raise InputError(
            "no stage is chosen; say stage=vqgan, import, distill, extract, prior, sample, evaluate, explore, compress, "
            f"decompress, export, report or pipeline; {PROGRAM} --help has more"
        )
    with pause_garbage_collection():
        stage: Callable[[Any], Any] = hydra.utils.get_method(path)
    return stage


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Importing torch and Lightning creates a million objects that stay; searching them for garbage takes a second.

    They are not frozen (gc.freeze), which would save another second when the program ends: triton's library then reports leaks.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def format_help() -> str:
    """What Hydra prints for --help, without composing. Hydra copies all of its registered configs once per group."""
    groups: dict[str, list[str]] = {}
    for file in sorted(CONF.rglob("*.yaml")):
        if file.parent != CONF:
            groups.setdefault(file.parent.relative_to(CONF).as_posix(), []).append(file.stem)
    lines = "".join(f"{group}: {', '.join(groups[group])}\n" for group in sorted(groups))
    template: str = OmegaConf.load(CONF / "config.yaml").hydra.help.template
    text = string.Template(template).substitute(APP_CONFIG_GROUPS=lines)
    return text.replace("python train.py", PROGRAM)


def list_settings() -> list[str]:
    """All groups and keys of this command's stage, for a suggestion; none if its choices don't go together."""
    words = [word for word in sys.argv[1:] if "=" in word and "," not in word]
    choices = [word for word in words if (CONF / word.split("=")[0]).is_dir()]
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = OmegaConf.to_container(hydra.compose("config", choices))
    except ConfigCompositionException:
        return []
    return list(list_keys(config))


def list_keys(node: object, prefix: str = "") -> Iterator[str]:
    """Dotted keys of nested dicts, a parent before its children."""
    for name, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{name}"
        yield from list_keys(value, f"{prefix}{name}.")


def explain_error(error: BaseException | None, keys: Callable[[], list[str]] = list) -> str | None:
    """The sentence for a user's mistake, or None if the mistake may be ours.

    Looks through the exceptions that Hydra wraps around others. `keys` returns the existing settings, for a suggestion.
    """
    cause = error
    while cause is not None:
        if isinstance(cause, InputError):  # that of a worker process includes its traceback
            return f"error: {str(cause).rstrip().rpartition('InputError: ')[2]}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, ValueError) and (message := explain_value_error(str(error))):
        return message
    if error is None or type(error).__module__.split(".")[0] not in ("hydra", "omegaconf"):
        return None
    return explain_composition_error(str(error), keys)


def explain_value_error(text: str) -> str | None:
    """The sentence for a ValueError of Optuna or of Hydra, by its text."""
    if text == "No trials are completed yet.":
        return (
            "error: Optuna found nothing because no point of the sweep was completed; failed/ in the sweep's folder has the "
            "error of each point, and the same command tries them again"
        )
    if text.startswith("Config group override must be a string"):
        return (
            "error: a group such as logger, loss or quantizer can't be null; leave a part of a loss out with a tilde "
            "(~loss/perceptual), and say logger=csv for files alone"
        )
    return None


def explain_composition_error(text: str, keys: Callable[[], list[str]]) -> str:
    """The sentence for an error of Hydra or OmegaConf, by its text."""
    if swept := re.search(r"Ambiguous value for argument '(.*?)'\n", text, re.DOTALL):
        return f"error: {explain_several_values(swept[1])}"
    if swept := re.search(r"Sweep parameters '(.*)' requires --multirun", text, re.DOTALL):
        return f"error: {explain_several_values(swept[1])}"
    if message := explain_choice(text):
        return f"error: {message}"
    if missing := re.search(r"Could not find '([\w/]+)/([^']*)'", text):
        group, option = missing.groups()
        if extra := PLUGINS.get(f"{group}={option}"):
            return f'error: {group}={option} needs a plugin of Hydra that is not installed; pip install "codegrid[{extra}]"'
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return f"error: {group}={option} does not exist{suggest(option, options)}; there is {', '.join(options)}"
    if missing := re.search(r"You must specify '(\w+)'", text):
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return f"error: {missing[1]} is not chosen; say {missing[1]}= one of {', '.join(options)}"
    if unmet := re.search(r"In '([\w/]+)/([^']+)': Could not override '([^']+)'", text):
        choice, group = f"{unmet[1]}={unmet[2]}", unmet[3]
        return (
            f"error: {choice} chooses {group}, and with the rest of this command there is none to choose; take another "
            f"{group.split('/')[0]}, or leave {choice} out and say what you want of conf/{unmet[1]}/{unmet[2]}.yaml"
        )
    if unknown := re.search(r"Could not override '([^']+)'", text):
        return (
            f"error: {unknown[1]} is not a setting of this stage{suggest(unknown[1], keys())}; "
            "add --cfg job to the command to see them all"
        )
    if missing := re.search(r"Error locating target '([^']+)'", text):
        return f"error: {explain_import(missing[1])}"
    failed = re.search(
        r"Error in call to target '[\w.]+':\s*(\w+\(.*\))\s*full_key: (\S+)", text, re.DOTALL
    )
    if failed:
        reason, key = " ".join(failed[1].split()), failed[2]
        return f"error: {key} can't be built from these settings ({reason}); add --cfg job to the command to see them all"
    return f"error: {' '.join(text.split())}"


def explain_choice(text: str) -> str | None:
    """The sentence for a choice, or a function of Hydra's, that its error's text names; None if it is another error."""
    if missing := re.search(r"Could not load '([\w/]+)/([^']*)'", text):  # in a list
        group, option = missing.groups()
        options = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
        return f"{group}={option} does not exist{suggest(option, options)}; there is {', '.join(options)}"
    if twice := re.search(r"Multiple values for (\S+)\. To override", text):
        return f"{twice[1]} is chosen already; write {twice[1]}=... without a plus before it"
    if unknown := re.search(
        r"parsing override '(.*?)'\n.*Unknown function '(\w+)'\nAvailable: (\S+)", text, re.DOTALL
    ):
        word, function, functions = unknown.groups()
        return (
            f"{word} calls {function}, which is no function of Hydra's{suggest(function, functions.split(','))}; "
            f"there is {functions.replace(',', ', ')}, and a text needs quotes inside the word"
        )
    return None


def explain_several_values(word: str) -> str:
    """The sentence for a word with several values in a command that is no sweep."""
    key, _, value = word.partition("=")
    sentence = (
        f"{word} has several values, and a single run takes one; add -m to run all of them in turn"
    )
    if is_group(key) or re.fullmatch(r"[\d.,e+-]+|\w+\(.*\)", value):
        return sentence
    quoted = shlex.quote(f'{key}="{value}"')
    return f"{sentence}, or write {quoted} if it is one text"
