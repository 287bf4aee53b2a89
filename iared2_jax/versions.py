"""Versions of the packages that made a result."""

import importlib.metadata

NOT_INSTALLED = "not installed"


def version(package: str) -> str:
    """Its version; `NOT_INSTALLED` for what is imported from a folder, e.g. this package itself."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED
