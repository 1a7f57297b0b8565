"""Optional packages, which an extra of the installation provides."""

from importlib.util import find_spec


def require(user: str, extra: str, *packages: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        user: the module that needs the packages.
        extra: the extra in `setup.cfg` that provides the packages.
        *packages: names to import.

    Raises:
        ModuleNotFoundError: if a package is missing. The message names the packages and the extra.
    """
    missing = [name for name in packages if not _is_installed(name)]
    if missing:
        raise ModuleNotFoundError(
            f'{user} needs {", ".join(missing)}: pip install "tokenpool[{extra}]", or pip install -e ".[{extra}]" in a '
            "clone",
            name=missing[0],
        )


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # a finder refuses the package, or sys.modules holds None for it
        return False
