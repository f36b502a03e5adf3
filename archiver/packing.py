"""Packing: an archive's files as bytes, the same bytes every time.

This module handles the zip, the manifest and TorchServe's settings, and does not know networks. Upstream's
torch-model-archiver is not used: it stamps the time of day into every entry, and works in `<tmp>/<model name>`, which
it removes if it exists. Here names are sorted, times and permissions constant, and entries stored uncompressed, so
that the bytes do not depend on zlib either; weights hardly compress, and git compresses the rest. The archive includes
a list of the files' digests, which the server checks (`server.trust`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.parameter import is_lazy

from handlers.network.archive import CARD, GRAPH, REFERENCE, WEIGHTS

HANDLERS = Path(__file__).resolve().parents[1] / "handlers"

CONFIG = "model-config.yaml"
ENTRY = "convscope_entry.py"
MANIFEST = "MAR-INF/MANIFEST.json"
DIGESTS = "MAR-INF/SHA256SUMS"

_EPOCH = (1980, 1, 1, 0, 0, 0)  # The earliest time that a zip can hold.
_TORCHSERVE = "0.12.0"


class ArchiveError(Exception):
    """An archive that cannot be made or read; the message says why and what to do."""


def pack(files: Mapping[str, bytes]) -> bytes:
    """Return the archive of `files` and the list of their digests, a pure function of names and contents.

    Args:
        files: Content by name inside the archive, `/` between folders.

    Raises:
        ArchiveError: The list cannot hold a name.
    """
    files = {**files, DIGESTS: list_digests(files)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, date_time=_EPOCH)
            entry.create_system = 3  # Unix, on every system: the permissions below are read that way.
            entry.external_attr = 0o100644 << 16
            entry.compress_type = zipfile.ZIP_STORED
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def list_digests(files: Mapping[str, bytes]) -> bytes:
    """Return the SHA-256 digest of each file, as `sha256sum --check` reads them.

    Raises:
        ArchiveError: sha256sum would write a name with escapes.
    """
    odd = [name for name in files if set(name) & set("\\\n\r")]
    if odd:
        raise ArchiveError(
            f"{odd[0]!r} cannot be the name of a file in an archive: it holds a backslash or a line break"
        )
    return "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)).encode()


def unpack(path: Path) -> dict[str, bytes]:
    """Return the files of an archive by name, without the list of their digests.

    Raises:
        ArchiveError: `path` is not an archive, or its files do not match its list, if it has one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            files = {entry.filename: archive.read(entry) for entry in entries}
    except (OSError, zipfile.BadZipFile) as err:
        raise ArchiveError(f"{path} cannot be read as an archive: {err}") from err
    if len(files) < len(entries):
        raise ArchiveError(f"{path} holds a file twice")
    if (listed := files.pop(DIGESTS, None)) is not None:
        wrong = set(listed.splitlines()) ^ set(list_digests(files).splitlines())
        if wrong:
            name = min(line[66:] for line in wrong).decode("utf-8", "replace")
            raise ArchiveError(f"{path} was changed after it was made: {name!r} is not as its {DIGESTS} says")
    return files


def write(path: Path, content: bytes) -> None:
    """Write `content` to `path` whole or not at all, readable by everyone: TorchServe may run as another user."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def handler_files() -> dict[str, bytes]:
    """Return the code every archive holds: the package `handlers/`, and the entry file TorchServe imports."""
    found = sorted(path for path in HANDLERS.rglob("*.py") if "__pycache__" not in path.parts)
    files = {f"handlers/{path.relative_to(HANDLERS).as_posix()}": path.read_bytes() for path in found}
    if "handlers/entry.py" not in files:
        raise ArchiveError(f"{HANDLERS} has no entry.py, which TorchServe calls")
    return files | {ENTRY: files["handlers/entry.py"]}


def is_ours(name: str) -> bool:
    """Return whether convscope writes a file of an archive; the others are the source of a user's network."""
    return name in (MANIFEST, ENTRY, CARD, WEIGHTS, CONFIG, GRAPH, REFERENCE) or name.startswith("handlers/")


def manifest(model: str, version: str) -> bytes:
    """Return MANIFEST.json. `createdOn` is constant; TorchServe warns if it is missing."""
    content = {
        "createdOn": "01/01/1980 00:00:00",
        "runtime": "python",
        "model": {"modelName": model, "handler": ENTRY, "modelVersion": version, "configFile": CONFIG},
        "archiverVersion": _TORCHSERVE,
    }
    return to_json(content)


def model_config(batch_size: int) -> bytes:
    """Return `handlers/model-config.yaml` with its batchSize filled in."""
    template = (HANDLERS / CONFIG).read_text(encoding="utf-8")
    text, count = re.subn(r"^batchSize: \d+$", f"batchSize: {batch_size}", template, flags=re.MULTILINE)
    if count != 1:
        raise ArchiveError(f"{HANDLERS / CONFIG} must have exactly one line `batchSize: <number>`, it has {count}")
    return text.encode()


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round the float32 tensors of two or more axes, nearly all of the bytes, to float16; a network loads either.

    Vectors stay float32: a running variance can lie outside float16's range.
    """
    return {
        name: value.half() if value.dtype == torch.float32 and value.ndim > 1 else value
        for name, value in state.items()
    }


def weights(state: Mapping[str, object]) -> bytes:
    """Return weights.safetensors: the state dict alone, the same bytes for the same numbers.

    Args:
        state: Tensors by name, of any shape, on any device. Order, strides, storage shared between tensors, metadata
            and `requires_grad` leave no trace: a network that ties weights ties them itself, and loads each of them.

    Raises:
        ArchiveError: A value is not a tensor (a module may keep anything as its extra state), has no shape yet, or is
            of a kind that the format does not have: sparse, quantized, complex128.
    """
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ArchiveError(f"the state dict holds more than tensors: {', '.join(sorted(odd))}")
    lazy = [name for name, value in state.items() if isinstance(value, Tensor) and is_lazy(value)]
    if lazy:
        raise ArchiveError(
            f"{lazy[0]} has no shape before the network saw a picture; run it once and give its weights with "
            "--state-dict, or write Conv2d and Linear with their sizes in place of LazyConv2d and LazyLinear"
        )
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    odd = [name for name, value in tensors.items() if value.layout != torch.strided or value.is_quantized]
    if odd:
        raise ArchiveError(f"{odd[0]} is sparse or quantized, which safetensors cannot hold; give plain tensors")
    # Copies, as the format rejects tensors that share memory, or whose cells are in another order.
    plain = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    try:
        return save(plain)
    except (SafetensorError, KeyError, ValueError) as err:
        dtypes = ", ".join(sorted({str(value.dtype) for value in plain.values()}))
        raise ArchiveError(f"the weights, of {dtypes}, cannot be held by safetensors: {err}") from err


def read_weights(content: bytes) -> dict[str, Tensor]:
    """Read the content of weights.safetensors.

    Raises:
        ArchiveError: The content is damaged.
    """
    try:
        found: dict[str, Tensor] = load(content)
    except (SafetensorError, ValueError) as err:
        raise ArchiveError(f"its {WEIGHTS} is damaged: {err}") from err
    return found


def to_json(content: object) -> bytes:
    """Return readable JSON, keys in the order given."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
