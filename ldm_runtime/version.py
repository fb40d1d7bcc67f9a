"""The version of the installed distribution."""


def version() -> str:
    """Return the version, or "0+unknown" where a source tree runs without being installed."""
    # Imported on demand: importlib.metadata takes longer to import than the rest of this package.
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    try:
        return installed_version("ldm-deploy")
    except PackageNotFoundError:
        return "0+unknown"
