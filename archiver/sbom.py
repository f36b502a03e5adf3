"""The bill of materials of an archive, as CycloneDX JSON 1.6: its packages with their licences, digests of its files.

    python -m archiver.sbom model_store/cifar.mar > cifar.cdx.json

The bytes depend on the archive alone: they hold no date, no random number and nothing of this machine. What an archive
needs and does not hold, such as torch, belongs in the image's bill.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import json
import sys
from collections.abc import Sequence
from email.message import Message
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

from archiver import packing
from archiver.packing import ArchiveError
from handlers.network.archive import CARD


def bill(path: Path) -> str:
    """Return the bill of an archive: the model, with what exported its graph as tools, its files and its packages.

    Raises:
        ArchiveError: The archive cannot be read, or is not convscope's.
    """
    files = packing.unpack(path)
    if CARD not in files:
        raise ArchiveError(f"{path} holds no {CARD}; it is not one of our archives")
    card = json.loads(files[CARD])
    model = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        name=card["model"],
        version=card["version"],
        description=card["description"] or None,
        hashes=[_sha256(path.read_bytes())],
    )
    parts = [
        Component(type=ComponentType.FILE, bom_ref=name, name=name, hashes=[_sha256(content)])
        for name, content in files.items()
    ]
    for name, content in files.items():
        if name.endswith(".dist-info/METADATA"):
            said = email.message_from_bytes(content)
            parts.append(_package(said["Name"], said["Version"], _licences(said)))
    exporters = card.get("graph", {}).get("versions", {})
    tools = ToolRepository(components=[_package(name, version) for name, version in exporters.items()])
    bom = Bom(metadata=BomMetaData(component=model, tools=tools), components=parts)
    bom.register_dependency(model, parts)
    # As `cyclonedx-py --output-reproducible` does; the library has no other way.
    bom.serial_number = None  # type: ignore[assignment]
    bom.metadata.timestamp = None  # type: ignore[assignment]
    return make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=2) + "\n"


def _sha256(content: bytes) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=hashlib.sha256(content).hexdigest())


def _package(name: str, version: str, licences: Sequence[str] = ()) -> Component:
    return Component(
        type=ComponentType.LIBRARY,
        bom_ref=f"{name}=={version}",
        name=name,
        version=version,
        purl=PackageURL("pypi", None, name, version),
        licenses=[LicenseFactory().make_from_string(text) for text in licences],
    )


def _licences(said: Message) -> list[str]:
    """Return the licences of a package, from the most exact field of its metadata."""
    exact = said.get_all("License-Expression") or said.get_all("License")
    return list(exact or (text.rpartition(" :: ")[2] for text in said.get_all("Classifier", [])))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 1 not possible."""
    parser = argparse.ArgumentParser(
        prog="python -m archiver.sbom",
        description="Write the bill of materials of an archive to standard output, as CycloneDX JSON 1.6.",
    )
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="such as model_store/cifar.mar")
    try:
        sys.stdout.write(bill(parser.parse_args(argv).archive))
    except ArchiveError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
