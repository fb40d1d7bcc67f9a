"""The version of the installed distribution, and how a message calls its extras."""


def version() -> str:
    """Return the version, or "0+unknown" where a source tree runs without being installed."""
    # Imported on demand: importlib.metadata takes longer to import than the rest of this package.
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    try:
        return installed_version("ldm-deploy")
    except PackageNotFoundError:
        return "0+unknown"


def extra(name: str) -> str:
    """Return how a message calls the extra that brings a package.

    Not as a command of pip, which would take the extra from wherever a package of this name is.
    """
    return f"the extra {name!r} of ldm-deploy"
