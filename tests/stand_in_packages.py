"""Packages that stand for those of a vendor: what is installed, and in which version, without the contents."""

from pathlib import Path


def install(folder: Path, distribution: str, version: str, *, module: str = "", source: str = "") -> None:
    """Write a distribution, and the module that it brings, into a folder for ``PYTHONPATH``.

    Args:
        folder: where to.
        distribution: its name for ``pip``.
        version: its version.
        module: a module's name, dotted where it lies in a package; empty: no module.
        source: what is in the module.
    """
    metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    package = folder
    for part in filter(None, module.split(".")):
        package /= part
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
    if module:
        (package / "__init__.py").write_text(source)
