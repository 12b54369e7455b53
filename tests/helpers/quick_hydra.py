"""Hydra with shortcuts, for tests that compose thousands of configs: the same configs in a third of the time.

Commands that are processes of their own have Hydra as it is.
"""

import copy
import os
from typing import Any

import pytest
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.object_type import ObjectType

load_config = ConfigRepository.load_config
embed_result_config = ConfigLoaderImpl._embed_result_config
create_interpolation_map = defaults_list._create_interpolation_map
make_caching_repository = CachingConfigRepository.__init__
get_mode = Hydra.get_mode


def shorten_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone, each file is parsed once and no map is made that no default reads."""
    monkeypatch.setattr(ConfigRepository, "load_config", FileReader().load_config)
    monkeypatch.setattr(ConfigLoaderImpl, "_embed_result_config", staticmethod(embed_copy))
    monkeypatch.setattr(defaults_list, "_create_interpolation_map", create_map_if_read)
    monkeypatch.setattr(CachingConfigRepository, "__init__", share_delegate)
    monkeypatch.setattr(Hydra, "get_mode", get_mode_if_set)


def restore_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone, Hydra is as it is installed."""
    monkeypatch.setattr(ConfigRepository, "load_config", load_config)
    monkeypatch.setattr(ConfigLoaderImpl, "_embed_result_config", staticmethod(embed_result_config))
    monkeypatch.setattr(defaults_list, "_create_interpolation_map", create_interpolation_map)
    monkeypatch.setattr(CachingConfigRepository, "__init__", make_caching_repository)
    monkeypatch.setattr(Hydra, "get_mode", get_mode)


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
