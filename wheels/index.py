"""Makes a package index that any static host can serve: PEP 503 (HTML), 691 (JSON), 658 (metadata).

    python -m wheels.index dist -o site

``site/<label>/tree-attn/`` for every wheel label of the matrix ("cu130", "cu130.sm90"), also those that dist has no
wheel for yet. Each offers its own wheels and the pure ones, which pip takes where no other fits; the labels are apart
because pip, shown all at once, takes the highest local version and not the one that runs. ``site/index.html`` is for
people. The files themselves lie once, in ``site/files/``. An existing site is replaced whole. Needs the standard
library and packaging alone.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import shutil
import tempfile
import urllib.parse
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from packaging.metadata import Metadata
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename

from wheels import matrix as matrices

JSON_TYPE = "application/vnd.pypi.simple.v1+json"


class File(NamedTuple):
    """A wheel, or an sdist, as the index describes it."""

    path: Path
    version: str
    label: str | None  # None for the pure wheel and the sdist
    sha256: str
    requires_python: str | None
    metadata: bytes | None  # the METADATA of a wheel


def read(path: Path, package: str) -> File:
    """Read one distribution.

    Raises:
        ValueError: it is another package, or its metadata and its name disagree.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.name.endswith(".tar.gz"):
        name, version = parse_sdist_filename(path.name)
        found = File(path, str(version), None, digest, None, None)
    else:
        name, version, _, _ = parse_wheel_filename(path.name)
        with zipfile.ZipFile(path) as archive:
            [entry] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1]
            raw = archive.read(entry)
        metadata = Metadata.from_email(raw, validate=False)
        if metadata.version != version:
            raise ValueError(f"{path.name} has the metadata of {metadata.version}; build it again")
        python = str(metadata.requires_python) if metadata.requires_python else None
        found = File(path, str(version), version.local, digest, python, raw)
    if canonicalize_name(name) != package:
        raise ValueError(f"{path.name} is not {package}; leave other packages out of the folder")
    return found


def make(dist: Path, site: Path, matrix: dict[str, Any], all_rows: bool = False) -> list[str]:
    """Write the index of the files in ``dist`` to ``site`` and return the labels it has.

    Args:
        dist: wheels and sdists, not in subfolders.
        site: replaced.
        all_rows: also rows that the matrix does not publish, for tests on the machine that built them.

    Raises:
        ValueError: a file of another package, or with a label that the index would not offer.
    """
    package = matrix["package"]
    labels = matrices.wheel_labels(matrix, published=not all_rows)
    found = [read(p, package) for p in sorted(dist.iterdir()) if p.name.endswith((".whl", ".tar.gz"))]
    for file in found:
        if file.label is not None and file.label not in labels:
            raise ValueError(f"{file.path.name}: the index has no {file.label!r}; it has {', '.join(labels)}")
    site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=site.parent) as scratch:
        fresh = Path(scratch) / "site"
        (fresh / "files").mkdir(parents=True)
        for file in found:
            shutil.copyfile(file.path, fresh / "files" / file.path.name)
            if file.metadata is not None:
                (fresh / "files" / f"{file.path.name}.metadata").write_bytes(file.metadata)
        for label in labels:
            _write_label(fresh / label, package, [f for f in found if f.label in (None, label)])
        (fresh / "index.html").write_text(front_page(matrix, labels, found))
        (fresh / ".nojekyll").touch()  # some hosts leave out what begins with an underscore
        shutil.rmtree(site, ignore_errors=True)
        fresh.rename(site)
    site.chmod(0o755)
    return labels


def _write_label(folder: Path, package: str, files: list[File]) -> None:
    project = folder / package
    project.mkdir(parents=True)
    links, entries = [], []
    for file in files:
        address = f"../../files/{urllib.parse.quote(file.path.name)}"  # a plus would be a space to some servers
        python = f' data-requires-python="{html.escape(file.requires_python)}"' if file.requires_python else ""
        core = None if file.metadata is None else hashlib.sha256(file.metadata).hexdigest()
        has = f' data-core-metadata="sha256={core}" data-dist-info-metadata="sha256={core}"' if core else ""
        links.append(f'<a href="{address}#sha256={file.sha256}"{python}{has}>{html.escape(file.path.name)}</a><br>')
        entry: dict[str, Any] = {
            "filename": file.path.name,
            "url": address,
            "hashes": {"sha256": file.sha256},
            "size": file.path.stat().st_size,
            "core-metadata": {"sha256": core} if core else False,
        }
        entries.append(entry | ({"requires-python": file.requires_python} if file.requires_python else {}))
    meta = {"api-version": "1.1"}
    versions = sorted({file.version for file in files})
    _write_pair(project, links, {"meta": meta, "name": package, "versions": versions, "files": entries})
    link = [f'<a href="{package}/">{package}</a><br>']
    _write_pair(folder, link, {"meta": meta, "projects": [{"name": package}]})


def _write_pair(folder: Path, links: list[str], value: dict[str, Any]) -> None:
    """index.html and index.json: a static host cannot negotiate, so clients that want JSON name the file."""
    head = '<!DOCTYPE html><html><head><meta name="pypi:repository-version" content="1.1"></head><body>'
    (folder / "index.html").write_text("\n".join([head, *links, "</body></html>"]) + "\n")
    (folder / "index.json").write_text(json.dumps(value, indent=1) + "\n")


def front_page(matrix: dict[str, Any], labels: list[str], files: list[File]) -> str:
    """For people: which command fits which machine, and what is there."""
    rows = []
    url = matrix["index_url"]
    for row in reversed(matrix["cuda"]):
        for variant in matrix["variant"]:
            label = matrices.wheel_label(row["label"], variant["name"])
            if label not in labels:
                continue
            newest = sorted({f.version for f in files if f.label == label}) or ["no wheel yet"]
            # Without an address of its own in the matrix, the page finds it where it is served.
            base = f'<span class="base">{html.escape(url)}</span>'
            command = f"pip install {matrix['package']} --extra-index-url {base}/{label}"
            rows.append(
                f"<tr><td>{row['driver']}</td><td>{html.escape(variant['serves'])}</td>"
                f"<td><code>{command}</code></td><td>{', '.join(newest)}</td></tr>"
            )
    downloads = "".join(
        f'<li><a href="files/{urllib.parse.quote(f.path.name)}">{html.escape(f.path.name)}</a></li>' for f in files
    )
    package = matrix["package"]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{package}: wheels</title>
<meta name="viewport" content="width=device-width">
<style>body{{font:16px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}}
td,th{{text-align:left;padding:.3em .8em;border-bottom:1px solid #ccc}}code{{background:#f3f3f3}}</style></head><body>
<h1>{package}</h1>
<p>One wheel serves every Python from {matrix["python"]} and every torch from {matrix["torch"]} on; the driver
(<code>nvidia-smi</code>) decides which. No suffix serves every GPU, the others are smaller
downloads for one generation. <code>tree-attn doctor</code> prints the command for the machine it runs on.</p>
<table><tr><th>NVIDIA driver, at least</th><th>GPUs</th><th>command</th><th>versions</th></tr>
{chr(10).join(rows)}
<tr><td>none</td><td>any machine</td><td><code>pip install {package}</code></td><td>without the CUDA kernels</td></tr>
</table>
<h2>Files</h2><ul>{downloads}</ul>
<script>for (const e of document.querySelectorAll(".base")) if (!e.textContent)
e.textContent = location.href.replace(/\\/(index\\.html)?$/, "");</script>
</body></html>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--all-rows", action="store_true", help="also the rows that are not published")
    given = parser.parse_args()
    try:
        labels = make(given.dist, given.output, matrices.load(), given.all_rows)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{given.output}: {', '.join(labels)}")


if __name__ == "__main__":
    main()
