"""Writes what is in a wheel as a CycloneDX document (SBOM), beside others in one folder.

    python -m wheels.sbom dist/*.whl -o sbom          sbom/tree_attn-0.1.0+cu130-py3-none-....whl.cdx.json

It names the wheel with its digest, the library in it, what was linked or compiled into that library (the CUDA runtime,
parts of the C++ library, torch's headers), as the library itself tells, and the packages that pip installs beside it.
The same wheel makes the same document. Checked against the schema before it is written. Needs cyclonedx-python-lib
with its extra json-validation, and packaging: ci/release_tools.txt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import uuid
import zipfile
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from cyclonedx.model import HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.contact import OrganizationalEntity
from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.metadata import Metadata

LIBRARY = "tree_attn/libtree_attn_cuda.so"
CUDA_LICENSE = DisjunctiveLicense(name="NVIDIA CUDA Toolkit EULA", url=XsUri("https://docs.nvidia.com/cuda/eula/"))


class Contents(NamedTuple):
    """What a wheel tells about itself."""

    metadata: Metadata
    library: bytes | None
    made: datetime  # the newest date in it, which a reproducible build takes from the commit


def read(wheel: Path) -> Contents:
    with zipfile.ZipFile(wheel) as archive:
        [entry] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1]
        metadata = Metadata.from_email(archive.read(entry), validate=False)
        library = archive.read(LIBRARY) if LIBRARY in archive.namelist() else None
        made = max(datetime(*info.date_time, tzinfo=timezone.utc) for info in archive.infolist())
    return Contents(metadata, library, made)


def describe(wheel: Path) -> str:
    """The document of ``wheel``, as JSON.

    Raises:
        ValueError: a library that does not say how it was built, or a document that is not valid CycloneDX.
    """
    contents = read(wheel)
    metadata, name = contents.metadata, contents.metadata.name.replace("_", "-")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    root = Component(
        name=name,
        version=str(metadata.version),
        type=ComponentType.LIBRARY,
        bom_ref=wheel.name,
        purl=PackageURL("pypi", None, name, str(metadata.version), {"file_name": wheel.name}),
        description=metadata.summary,
        licenses=[LicenseExpression(metadata.license_expression)] if metadata.license_expression else [],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
    )
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"sha256:{sha256}"))
    bom.metadata.component = root
    bom.metadata.timestamp = contents.made
    beside = _installed_beside(metadata)
    inside = _inside(contents.library) if contents.library is not None else []
    bom.components.update([*beside, *inside])
    bom.register_dependency(root, [*beside, *inside[:1]])
    if inside:
        bom.register_dependency(inside[0], inside[1:])
    text = JsonV1Dot6(bom).output_as_string(indent=1)
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if problem is not None:
        raise ValueError(f"{wheel.name}: the document is not valid CycloneDX 1.6: {problem}")
    return text + "\n"


def _installed_beside(metadata: Metadata) -> list[Component]:
    """What pip installs with the wheel; without a version, which the user's environment decides."""
    required = [r for r in metadata.requires_dist or [] if r.marker is None or "extra" not in str(r.marker)]
    return [
        Component(
            name=r.name,
            type=ComponentType.LIBRARY,
            bom_ref=f"beside:{r.name}",
            purl=PackageURL("pypi", None, r.name),
            scope=ComponentScope.REQUIRED,
            description=f"not in the wheel; installed beside it: {r}",
        )
        for r in required
    ]


def _inside(library: bytes) -> list[Component]:
    """The library, then what was linked or compiled into it."""
    said = re.search(rb'\{"version": "[^}]*\}', library)
    if said is None:
        raise ValueError("the library does not say how it was built; build it with csrc/build.py")
    build = json.loads(said[0])
    sha256 = hashlib.sha256(library).hexdigest()
    compilers = sorted({c.decode() for c in re.findall(rb"GCC: [^\0]*", library)})  # cudart's own among them
    return [
        Component(
            name=LIBRARY,
            version=build["version"],
            type=ComponentType.FILE,
            bom_ref=LIBRARY,
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
            properties=[
                Property(name="tree-attn:architectures", value=" ".join(build["archs"])),
                Property(name="tree-attn:commit", value=build["commit"] or "unknown"),
                *(Property(name="tree-attn:compiler", value=compiler) for compiler in compilers),
            ],
        ),
        Component(
            name="cudart",
            version=build["cuda"],
            type=ComponentType.LIBRARY,
            bom_ref="inside:cudart",
            supplier=OrganizationalEntity(name="NVIDIA"),
            licenses=[CUDA_LICENSE],
            description="the CUDA runtime, linked statically",
        ),
        Component(
            name="torch",
            version=build["torch"],
            type=ComponentType.LIBRARY,
            bom_ref="inside:torch-headers",
            purl=PackageURL("pypi", None, "torch", build["torch"]),
            licenses=[LicenseExpression("BSD-3-Clause")],
            description="the headers of the stable ABI, compiled in",
        ),
        Component(
            name="libstdc++",
            type=ComponentType.LIBRARY,
            bom_ref="inside:libstdc++",
            supplier=OrganizationalEntity(name="GNU Compiler Collection"),
            licenses=[LicenseExpression("GPL-3.0-or-later WITH GCC-exception-3.1")],
            description="templates, compiled in, and what the platform's own lacks, linked statically",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for wheel in given.wheels:
        try:
            text = describe(wheel)
        except ValueError as error:
            raise SystemExit(f"error: {wheel.name}: {error}") from None
        path = given.output / f"{wheel.name}.cdx.json"
        path.write_text(text)
        print(path)


if __name__ == "__main__":
    main()
