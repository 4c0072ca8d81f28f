"""Which versions of the packages that compute are installed here."""

from importlib.metadata import PackageNotFoundError, version

VERSIONED = ("torch", "torchvision", "timm", "numpy", "pillow", "pyarrow", "webdataset", "prefect", "duckdb")


def package_versions(names: tuple[str, ...] = VERSIONED) -> dict[str, str]:
    """The installed versions of packages, without importing them."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
