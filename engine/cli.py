"""How a mistake on the command line becomes one sentence."""

import difflib
import re
from collections.abc import Callable

from engine.errors import InputError

PLUGINS = {  # what Hydra finds only where the extra of this name is installed
    "hydra/launcher=joblib": "joblib",
    "hydra/launcher=submitit_slurm": "submitit",
    "hydra/launcher=submitit_local": "submitit",
    "hydra/sweeper=optuna": "optuna",
}


def explain_error(error: BaseException | None, keys: Callable[[], list[str]] = list) -> str | None:
    """The sentence for a person's mistake, or None where the mistake may be ours.

    Looks through the exceptions that Hydra wraps around others. `keys` gives the settings that exist, for a suggestion.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, InputError):
            return f"error: {str(seen).rstrip().rpartition('InputError: ')[2]}"  # of a worker process it comes with its traceback
        seen = seen.__cause__ or seen.__context__
    if (
        isinstance(error, ValueError) and str(error) == "No trials are completed yet."
    ):  # as Optuna says it
        return (
            "error: Optuna found nothing, for no point of the sweep came to an end; failed/ in the sweep's folder keeps what was "
            "wrong with each, and the same command tries them again"
        )
    if isinstance(error, ValueError) and str(error).startswith(
        "Config group override must be a string"
    ):  # as Hydra says it
        return (
            "error: a group such as logger, loss or quantizer can't be null; leave a part of a loss out with a tilde "
            "(~loss/perceptual), and say logger=csv for files alone"
        )
    if error is None or type(error).__module__.split(".")[0] not in ("hydra", "omegaconf"):
        return None
    text = str(error)
    if missing := re.search(r"Could not find '([\w/]+)/([^']+)'", text):
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
    if failed := re.search(
        r"Error in call to target '[\w.]+':\s*(\w+\(.*\))\s*full_key: (\S+)", text, re.DOTALL
    ):
        reason, key = " ".join(failed[1].split()), failed[2]
        return f"error: {key} can't be made of these settings ({reason}); add --cfg job to the command to see them all"
    return f"error: {' '.join(text.split())}"


def suggest(word: str, options: list[str]) -> str:
    """The question whether the nearest of the options was meant, with its comma; empty where none is near."""
    close = difflib.get_close_matches(
        word, [option for option in options if option != word], n=1, cutoff=0.6
    )
    return f", did you mean {close[0]}?" if close else ""
