"""Versions of installed packages. Imports no torch."""

from importlib.metadata import PackageNotFoundError, version


def package_version(package: str) -> str | None:
    """The version of a package; None for one without metadata, such as a source tree, or a fork that is called otherwise."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
