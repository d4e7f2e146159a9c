"""Public datasets by name: where they are, and downloads that verify and resume.

pooch keeps the cache and compares checksums; what it lacks, going on with half a download, is the `resume` here.
Where nobody has published a checksum, the one of the first download is kept beside the file and holds from then on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cfrl.errors import UserError, nearest

CDVAE = "https://raw.githubusercontent.com/txie-93/cdvae/main/data"
DIFFCSP = "https://raw.githubusercontent.com/jiaor17/DiffCSP/main/data"
ALEX_20 = "https://huggingface.co/datasets/zdcao/alex-20/resolve/main"
_ATTEMPTS = 4
_WAIT = 1.0  # seconds before the second attempt, doubled for each further one
_BLOCK = 1 << 16  # bytes; what a broken connection can lose


@dataclass(frozen=True)
class SourceFile:
    """One file of a public dataset.

    url: where it is.
    sha256: its checksum; "" if unknown.
    split: "train", "validation" or "test" where the publisher says so, else "".
    """

    url: str
    sha256: str = ""
    split: str = ""


def _splits(folder: str) -> tuple[SourceFile, ...]:
    names = {"train": "train", "validation": "val", "test": "test"}
    return tuple(SourceFile(f"{folder}/{name}.csv", split=split) for split, name in names.items())


SOURCES: dict[str, tuple[SourceFile, ...]] = {
    "mp-20": _splits(f"{CDVAE}/mp_20"),
    "perov-5": _splits(f"{CDVAE}/perov_5"),
    "carbon-24": _splits(f"{CDVAE}/carbon_24"),
    "mpts-52": _splits(f"{DIFFCSP}/mpts_52"),
    "alex-20": _splits(f"{ALEX_20}/alex20"),
    "alexandria-hull": (SourceFile(f"{ALEX_20}/convex_hull_pbe_2023.12.29.json.bz2"),),
}


def source_files(name: str, extra: Mapping[str, dict | list[dict]]) -> tuple[SourceFile, ...]:
    """The files of a named source, of those built in or of `extra`: name -> {url, sha256, split}, or a list of them.

    Raises:
        UserError: an unknown name, or an entry of `extra` that is not of this form.
    """
    if name in extra:
        tables = extra[name] if isinstance(extra[name], list) else [extra[name]]
        try:
            return tuple(SourceFile(**table) for table in tables)
        except TypeError as error:
            raise UserError(f"data.sources.{name}: must be a table with url, and sha256 and split if wanted") from error
    if name in SOURCES:
        return SOURCES[name]
    known = sorted({*SOURCES, *extra})
    raise UserError(f"no dataset named '{name}' is known{nearest(name, known)} (known: {', '.join(known)})")


def download(file: SourceFile, folder: Path, progress: Callable[[int, int], None] | None = None) -> tuple[Path, str]:
    """The file in `folder`, downloaded if it is not there, its checksum verified.

    Args:
        file: what to get.
        folder: where to keep it.
        progress: called with the bytes that are here and those of the whole file (0 if unknown).

    Returns:
        The path, and what to tell the user about the checksum.

    Raises:
        UserError: no connection, the server refuses, or the checksum differs.
    """
    import pooch
    from requests import RequestException

    pooch.get_logger().setLevel("WARNING")  # the progress bar says enough
    name = Path(urlsplit(file.url).path).name
    record = folder / f"{name}.sha256"
    recorded = record.read_text(encoding="utf-8").split()[0] if record.exists() else ""
    expected = file.sha256 or recorded
    partial = folder / f"{name}.part"

    def downloader(url: str, output_file: str, pooch: object) -> None:
        resume(url, partial, progress)
        os.replace(partial, output_file)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = Path(pooch.retrieve(file.url, expected or None, fname=name, path=folder, downloader=downloader))
    except RequestException as error:
        raise UserError(f"{file.url}: cannot be downloaded ({_reason(error)}); run again to go on with it") from error
    except ValueError as error:  # pooch's word for another checksum
        raise UserError(f"{file.url}: has another checksum than {expected}: damaged or changed; not kept") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    if expected:
        return path, "checksum verified" if file.sha256 else "checksum as at the first download"
    digest = pooch.file_hash(str(path))
    record.write_text(f"{digest}  {name}\n", encoding="utf-8")
    return path, f"no published checksum is known; sha256 {digest[:12]}... recorded, later downloads must match it"


def resume(url: str, partial: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Download to `partial`, going on where an earlier attempt broke off if the file has not changed since.

    Raises:
        requests.RequestException: the connection failed for good; what has come is kept.
    """
    from requests import ConnectionError, Timeout
    from requests.exceptions import ChunkedEncodingError

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _continue(url, partial, progress)
        except (ConnectionError, Timeout, ChunkedEncodingError):
            if attempt == _ATTEMPTS:
                raise
            time.sleep(_WAIT * 2 ** (attempt - 1))


def _continue(url: str, partial: Path, progress: Callable[[int, int], None] | None) -> None:
    import requests

    tag = partial.with_suffix(".etag")  # what the server called the version that `partial` is half of
    done = partial.stat().st_size if partial.exists() and tag.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if done:
        headers |= {"Range": f"bytes={done}-", "If-Range": tag.read_text(encoding="utf-8")}
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code == 416:  # nothing is left: all of it came, but the file was not yet moved
            return
        response.raise_for_status()
        if response.status_code != 206:
            done = 0
            version = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if version and not version.startswith("W/"):
                tag.write_text(version, encoding="utf-8")
            else:
                tag.unlink(missing_ok=True)
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else 0
        with partial.open("ab" if done else "wb") as file:
            for block in response.iter_content(_BLOCK):
                file.write(block)
                done += len(block)
                if progress:
                    progress(done, total)
    if total and done != total:
        raise requests.ConnectionError(f"connection broke off after {done} of {total} bytes")
    tag.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answers {response.status_code}"
    if "broke off" in str(error) or "IncompleteRead" in str(error):
        return "the connection broke off"
    return "no connection; the dataset 'prototypes' needs none"
