"""Hydra with shortcuts, for tests that compose thousands of configs: the same configs in a third of the time.

Commands that tests start as fresh processes have Hydra as it is; forks (tests/helpers/forks.py) have the shortcuts too.
"""

import copy
import io
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import yaml
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.object_type import ObjectType
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf, _utils

load_config = ConfigRepository.load_config
embed_result_config = ConfigLoaderImpl._embed_result_config
create_interpolation_map = defaults_list._create_interpolation_map
get_mode = Hydra.get_mode
load_sweep_config = ConfigLoaderImpl.load_sweep_config
get_yaml_loader = _utils.get_yaml_loader
ORIGINALS = [  # all that the shortcuts replace
    (owner, name, vars(owner)[name])
    for owner, name in (
        (ConfigRepository, "load_config"),
        (ConfigLoaderImpl, "_embed_result_config"),
        (defaults_list, "_create_interpolation_map"),
        (CachingConfigRepository, "__init__"),
        (Hydra, "get_mode"),
        (Sweeper, "validate_batch_is_legal"),
        (ConfigLoaderImpl, "load_sweep_config"),
        (_utils, "get_yaml_loader"),
    )
]


def shorten_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone, each file is parsed once and no map is made that no default reads."""
    monkeypatch.setattr(ConfigRepository, "load_config", FileReader().load_config)
    monkeypatch.setattr(ConfigLoaderImpl, "_embed_result_config", staticmethod(embed_copy))
    monkeypatch.setattr(defaults_list, "_create_interpolation_map", create_map_if_read)
    monkeypatch.setattr(CachingConfigRepository, "__init__", share_delegate)
    monkeypatch.setattr(Hydra, "get_mode", get_mode_if_set)
    points = PointComposer()
    monkeypatch.setattr(Sweeper, "validate_batch_is_legal", points.validate)
    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", points.load)
    monkeypatch.setattr(_utils, "get_yaml_loader", make_yaml_loader)


def restore_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone, Hydra is as it is installed."""
    for owner, name, value in ORIGINALS:
        monkeypatch.setattr(owner, name, value)


class FileReader:
    """Parsed config files by name, time and size."""

    def __init__(self) -> None:
        self._results: dict[tuple[object, ...], Any] = {}

    @property
    def load_config(self) -> Any:
        """The method that replaces ConfigRepository's."""

        def load(repository: ConfigRepository, config_path: str) -> Any:
            source = repository._find_object_source(config_path, ObjectType.CONFIG)
            if source is None or source.scheme() != "file":
                return load_config(repository, config_path)
            file = os.path.join(source.path, source._normalize_file_name(config_path))
            status = os.stat(file)
            key = (source.provider, file, status.st_mtime_ns, status.st_size)
            if key not in self._results:
                self._results[key] = load_config(repository, config_path)
            return copy.copy(self._results[key])

        return load


def embed_copy(result: Any, package: str | None) -> Any:
    """_embed_result_config, which copies what becomes a branch of the config, but not what becomes its root."""
    embedded = embed_result_config(result, package)
    if embedded is result:
        embedded = copy.copy(result)
        embedded.config = copy.deepcopy(result.config)
    return embedded


def create_map_if_read(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
    """The choices that a default such as `${quantizer}_small` reads; None where no default has a reference."""
    if any(default.is_interpolation() for default in defaults):
        return create_interpolation_map(overrides, defaults, self_added)
    return None


def share_delegate(self: CachingConfigRepository, delegate: ConfigRepository) -> None:
    """CachingConfigRepository.__init__ with a shallow copy: initialize_sources makes a new list of sources."""
    self.delegate = copy.copy(delegate)
    self.cache = {}


def get_mode_if_set(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """hydra.mode, for which Hydra composes all; None, as nearly always, where no word and no folder of one's own can set it."""
    own = any(
        path.provider == "command-line" for path in self.config_loader.get_search_path().get_path()
    )
    if own or any("hydra" in word or "experiment" in word for word in overrides):
        return get_mode(self, config_name, overrides)
    return None


class PointComposer:
    """Composes each point of a sweep once: Hydra composes all when it validates them, and each again when it starts."""

    def __init__(self) -> None:
        self._configs: dict[tuple[str, ...], DictConfig] = {}

    @property
    def validate(self) -> Any:
        """The method that replaces Sweeper's."""

        def validate_batch_is_legal(sweeper: Any, batch: Sequence[Sequence[str]]) -> None:
            loader = sweeper.hydra_context.config_loader
            self._configs.clear()
            for words in batch:
                config = load_sweep_config(loader, sweeper.config, list(words))
                self._configs[tuple(words)] = config

        return validate_batch_is_legal

    @property
    def load(self) -> Any:
        """The method that replaces ConfigLoaderImpl's."""

        def load(loader: Any, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
            config = self._configs.pop(tuple(sweep_overrides), None)
            if config is None:
                return load_sweep_config(loader, master_config, sweep_overrides)
            OmegaConf.copy_cache(from_config=master_config, to_config=config)
            return config

        return load


class NamedText(io.StringIO):
    """A file's text, which was read before."""

    name: Any


@cache
def make_yaml_loader() -> Any:
    """OmegaConf's class for reading YAML, made once and with libyaml's parser, which takes a sixth of the time."""
    slow = get_yaml_loader()
    if not yaml.__with_libyaml__:
        return slow

    class QuickLoader(yaml.cyaml.CParser, slow):  # type: ignore[misc, valid-type, name-defined]
        def __init__(self, stream: Any) -> None:
            self.text = stream.read() if hasattr(stream, "read") else stream
            self.file = getattr(stream, "name", None)
            yaml.cyaml.CParser.__init__(self, self.text)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

        def get_single_data(self) -> Any:
            try:
                return super().get_single_data()
            except yaml.YAMLError:  # libyaml says less of what is wrong
                again = NamedText(self.text)
                again.name = self.file
                return slow(again if self.file else self.text).get_single_data()

    return QuickLoader
