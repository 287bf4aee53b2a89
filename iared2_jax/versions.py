"""Versions of the packages that made a result."""

import importlib.metadata

NOT_INSTALLED = "not installed"


def version(package: str) -> str:
    """A package's version; `NOT_INSTALLED` of one that is imported from a folder alone."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED
