"""Words of a command line as a user types them: in the order and with the quotes that Hydra needs, and back into a shell's words.

A word is key=value, and everything after the first `=` is the value. Hydra reads values by a grammar of its own, in which many
names of files are errors, calls of functions or numbers.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

from codegrid.engine.defaults import CONF
from codegrid.engine.errors import InputError
from codegrid.engine.texts import expand_home, is_optional, is_path, is_text, may_be_number

OPTIONS: dict[str, tuple[str, ...] | None] = {  # Hydra's; the values that one takes, () for any, None for no value
    "--help": None, "-h": None, "--hydra-help": None, "--version": None, "--resolve": None, "--run": None, "-r": None,
    "--multirun": None, "-m": None, "--shell-completion": None, "-sc": None, "--package": (), "-p": (),
    "--config-path": (), "-cp": (), "--config-name": (), "-cn": (), "--config-dir": (), "-cd": (),
    "--experimental-rerun": (), "--cfg": ("job", "hydra", "all"), "-c": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "-i": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}  # fmt: skip
ALONE = ("--info", "-i")  # options whose value may be missing

PART = r"[\w$][\w$-]*"
KEY = re.compile(rf"(\+\+?|~)?({PART}([./]{PART})*)?(@[\w$.:/-]+)?", re.ASCII)
SIMPLE = re.compile(r"[\w/.+-]+", re.ASCII)  # Hydra's grammar takes these values
CALL = re.compile(r"[A-Za-z_]\w*\(.*\)", re.ASCII | re.DOTALL)
OPENING, CLOSING = "([{", ")]}"


def prepare_words(words: Sequence[str]) -> list[str]:
    """The words of a command line for Hydra: options first, values quoted where its grammar needs it.

    Doing it twice changes nothing, so a process may start others with its own words. Raises InputError for a word that is
    neither an option nor key=value.
    """
    options, settings = arrange_words(words)
    for word in settings:
        check_word(word)
    multirun = is_multirun(options, settings)
    return [*options, *(quote_word(word, multirun) for word in settings)]


def arrange_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options with their values, and settings, each in their order. argparse refuses settings on both sides of an option."""
    options: list[str] = []
    settings: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return options, [*settings, *rest]
        if not word.startswith("-"):
            settings.append(word)
            continue
        name, equals, value = word.partition("=")
        options.append(f"{name}={expand_home(value)}" if equals else word)
        values = OPTIONS[find_option(name)]
        if equals and values is None:
            raise InputError(f"{name} takes no value, so ={value} has to go")
        if equals and values and value not in values:
            raise InputError(f"{word} must be one of {', '.join(values)}")
        if values is None or equals or (name[:2] != "--" and name not in OPTIONS):
            continue
        if rest and (rest[0] in values if values else True):
            options.append(rest.pop(0))
        elif find_option(name) not in ALONE:
            wanted = f"one of {', '.join(values)}" if values else "a value"
            raise InputError(f"{name} needs {wanted} after it")
    return options, settings


def find_option(name: str) -> str:
    """The option that a word such as --multirun, --multi or -m names. Raises InputError if there is none."""
    if name in OPTIONS:
        return name
    if name.startswith("--"):
        matches = [option for option in OPTIONS if option.startswith(name)]
    else:
        matches = [name[:2]] if name[:2] in OPTIONS else []  # -cjob, -mr
    if len(matches) != 1:
        raise InputError(
            f"{name} is not an option; settings are written without dashes, as in trainer.max_steps=1000, "
            "and --help lists the options' uses"
        )
    return matches[0]


def check_word(word: str) -> None:
    """Raise InputError for a word that is not key=value, or ~key."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{word!a} holds bytes that are no UTF-8 text, which config.yaml can't record; "
            "rename the file or folder, or make a link to it: ln -s"
        ) from error
    key, equals, _ = word.partition("=")
    if not equals and not (word.startswith("~") and KEY.fullmatch(word)):
        raise InputError(
            f"{word} is not a setting, which is written key=value; "
            "a value with spaces needs quotes around the whole word: 'data.root=my photos'"
        )
    if not KEY.fullmatch(key) or not key.strip("+~"):
        raise InputError(f"{key} in {word} can't be the name of a setting; write key=value")


def is_multirun(options: Sequence[str], settings: Sequence[str]) -> bool:
    """Whether the command is a sweep: by -m, by hydra.mode, or because a file that it chooses says so.

    Composing takes a third of a second and is left out where no value depends on the answer.
    """
    if any(name_option(option) in ("--multirun", "-m") for option in options):
        return True
    simple = [word for word in settings if not re.search(r"[,(]", word)]
    if len(simple) == len(settings):
        return False
    chosen = name_searchpath(read_config_dirs(options))
    chosen += [quote_word(word, multirun=False) for word in simple]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", chosen, return_hydra_config=True)
    except (
        HydraException
    ):  # another mistake, which Hydra reports when it composes the whole command
        return False
    return config.hydra.mode is not None and config.hydra.mode.name == "MULTIRUN"


def read_config_dirs(options: Sequence[str]) -> list[str]:
    """The folders of the user's own configs that options name, --config-dir=myconf or --config-dir myconf."""
    return [
        option.partition("=")[2] or options[i + 1]
        for i, option in enumerate(options)
        if name_option(option) in ("--config-dir", "-cd")
    ]


def name_searchpath(folders: Sequence[str]) -> list[str]:
    """The setting of Hydra's that adds folders of configs to this program's; none for no folders."""
    paths = ",".join(quote_text(f"file://{Path(folder).absolute()}") for folder in folders)
    return [f"hydra.searchpath=[{paths}]"] if paths else []


def name_option(word: str) -> str | None:
    """The option that a word is, with its value or without; None for a value that stands by itself."""
    return find_option(word.partition("=")[0]) if word.startswith("-") else None


def quote_word(word: str, multirun: bool) -> str:
    """A word for Hydra: its value is quoted if it is text that Hydra would refuse or take for something else.

    Values that mean what they say stay: words, numbers, null, quoted text, lists, mappings, references such as ${seed}. Commas
    separate the values of a sweep, where Hydra's functions such as choice(...) stay too; elsewhere they are part of a text.
    """
    key, equals, value = word.partition("=")
    name = key.lstrip("+~")
    if not equals or (SIMPLE.fullmatch(value) and not (is_text(name) or is_group(name))):
        return word
    is_swept = (
        multirun and name != "sweep" and not name.startswith("hydra.")
    )  # these describe the sweep
    quoted = quote_value(name, value.strip(), is_swept)
    if name.startswith("hydra.") and is_path(name):  # Hydra uses it before a stage could expand it
        text = parse_value(quoted)
        if isinstance(text, str) and text.startswith("~"):
            quoted = quote_text(expand_home(text))
    return word if quoted == value.strip() else f"{key}={quoted}"


def quote_value(key: str, value: str, multirun: bool) -> str:
    """The value of a key for Hydra's grammar."""
    override = parse_word(f"key={value}")
    if override is not None and not override.is_sweep_override():
        return quote_element(key, value, multirun)
    parts = split_elements(value)
    if multirun and len(parts) > 1:
        if not all(parts):
            raise InputError(
                f"{key}={value} has nothing before or after one of its commas; values of a sweep are written without "
                "spaces, as in quantizer.K=128,512, and a text that holds commas needs quotes inside the word"
            )
        return ",".join(quote_element(key, part, multirun) for part in parts)
    if override is None:
        return quote_element(key, value, multirun)
    # A sweep. Outside of one Hydra refuses it, with the advice to start one, unless it is a text.
    looks_swept = CALL.fullmatch(value) or all(re.fullmatch(r"[\w.+-]+", part) for part in parts)
    return value if multirun or (looks_swept and not is_text(key)) else quote_text(value)


def quote_element(key: str, value: str, multirun: bool = False) -> str:
    """One value, which is no choice between several: a text, number, list or mapping."""
    override = parse_word(f"key={value}")
    textual = is_text(key) or is_group(key)
    if value[:1] + value[-1:] in ("[]", "{}") and (override is None or textual):
        entries = split_elements(value[1:-1])
        quoted = [quote_entry(key, entry) for entry in entries]
        if quoted != entries:
            listed = f"{value[0]}{','.join(quoted)}{value[-1]}"
            return listed if parse_word(f"key={listed}") else quote_text(value)
    is_call = CALL.fullmatch(value) is not None
    if override is None:  # if a function's name or arguments are wrong, Hydra says which
        return value if is_call and multirun and not textual else quote_text(value)
    parsed = override.value()
    if not textual or (parsed is False and is_optional(key)) or (is_call and multirun):
        return value
    return quote_text(value) if reads_as_number(parsed) and not may_be_number(key) else value


def quote_entry(key: str, entry: str) -> str:
    """One entry of a list, or of a mapping, whose keys have no quotes in Hydra's grammar."""
    pair = re.fullmatch(r"([\w.-]+): *(.+)", entry, re.DOTALL)
    if pair is not None:
        return f"{pair[1]}: {quote_element(key, pair[2])}"
    return quote_element(key, entry) if entry else entry


def split_elements(value: str) -> list[str]:
    """The parts of a value between its commas, apart from commas inside brackets or quotes."""
    parts = [""]
    depth, quote = 0, ""
    for i, letter in enumerate(value):
        if quote:
            quote = "" if letter == quote and value[i - 1] != "\\" else quote
        elif letter in "'\"" and not parts[-1].strip() and closes(value, i):
            quote = letter
        elif letter in OPENING:
            depth += 1
        elif letter in CLOSING:
            depth -= 1
        if letter == "," and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth != 0:  # brackets that are part of a name
        parts = value.split(",")
    return [part.strip() for part in parts]


def closes(value: str, start: int) -> bool:
    """Whether the quote at `start` has a partner after which an element ends."""
    quote = value[start]
    return re.search(rf"(?<!\\){quote}\s*([,\])}}]|$)", value[start + 1 :]) is not None


def parse_word(word: str) -> Override | None:
    """A word as Hydra reads it; None if its grammar refuses it."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def parse_value(value: str) -> Any:
    """A value as Hydra reads it; None also if its grammar refuses it."""
    override = parse_word(f"key={value}")
    return None if override is None else override.value()


def reads_as_number(value: Any) -> bool:
    return isinstance(value, int | float)


def is_group(key: str) -> bool:
    """Whether a key chooses a file of a config group, such as quantizer or loss/discriminator@x."""
    name = key.partition("@")[0]
    return "/" in name or (bool(name) and (CONF / name).is_dir())


def quote_text(text: str) -> str:
    """A text in Hydra's quotes. What looks like a reference to another setting, such as ${seed}, stays one."""
    try:
        OmegaConf.create({"key": text})
    except GrammarParseError as error:
        raise InputError(
            f"{text} has ${{, which begins a reference to another setting such as ${{seed}}; "
            "rename the file or folder, or make a link to it: ln -s"
        ) from error
    return QuotedString(text, Quote.double).with_quotes()


def escape_references(text: str) -> str:
    """The text in which OmegaConf reads no ${...}."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def format_word(key: str, value: object) -> str:
    """key=value as a word that a user can paste into a shell, and that means this value."""
    text = expand_home(str(value)) if is_path(key) else str(value)
    word = f"{key}={text}"
    if "${" not in text and parse_value(quote_word(word, multirun=False).partition("=")[2]) == text:
        return shlex.quote(word)
    quoted = QuotedString(escape_references(text), Quote.double).with_quotes()
    return shlex.quote(f"{key}={quoted}")


def clean_key(word: str) -> str:
    """The dotted key of a word of the command line, as in loss.discriminator of loss/discriminator=style."""
    return word.lstrip("+~").split("=")[0].split("@")[0].replace("/", ".")
