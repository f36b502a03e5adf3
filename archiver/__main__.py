"""Archives: from a checkpoint, or a network of your own, to a `.mar` that a stock TorchServe loads.

    python -m archiver --checkpoint runs/cifar/checkpoint.pt
    python -m archiver --arch torchvision.models:resnet18 --arguments '{"num_classes": 10}' --name pets \
        --state-dict weights.pt --classes classes.txt --layers conv1=relu,deep=layer4.1.add --size 224x224 \
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
    python -m archiver --torchvision resnet18 --state-dict resnet18-f37072fd.pth --layers auto
    python -m archiver --timm resnet50.a1_in1k --state-dict model.safetensors --layers auto
    python -m archiver --arch path/to/net.py:Net --name mine ...    # without --layers: what there is
    python -m archiver --check      # do the archives of model_store/ hold today's handlers/?
    python -m archiver --refresh    # put today's handlers/ into them; weights, card and graph stay
    python -m archiver --refresh --engine onnx    # and export their graphs for ONNX Runtime anew
    python -m archiver --refresh --sign ~/.ssh/id_ed25519    # and sign them; as with every way to make an archive

The same input gives the same bytes, in every process and checkout. The source of your own network travels in the
archive: the one file, or all Python files of its package; and of installed packages what the network imports. Each step
is logged on standard error, warnings of libraries are not: python -W default -m archiver shows these too.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from archiver import packing
from archiver.arguments import parse
from archiver.contents import Contents, from_checkpoint
from archiver.external import from_network, read_classes
from archiver.graph import with_engine
from archiver.packing import ArchiveError
from archiver.quiet import quiet_libraries
from archiver.recipes import describe
from archiver.store import build, check, refreshed, sign, write
from handlers.images.preprocessing import Preprocessing
from handlers.network.archive import CARD, KIND, LAYOUTS, NO_GRADIENTS, PROBABILITIES, VALUE, scores_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 1 out of date or not possible.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # As in a worker; threads that share a core wait for each other at every layer.
    try:
        with quiet_libraries(_note):
            return _run(parse(argv, __doc__ or ""))
    except ArchiveError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.check:
        return _check_store(arguments.store)
    if arguments.refresh:
        return _refresh_store(arguments.store, arguments.engine, arguments.sign)
    with nullcontext() if arguments.quiet else _progress():
        if arguments.checkpoint:
            contents = from_checkpoint(arguments.checkpoint, arguments.version, half=arguments.half)
        else:
            contents = _own(arguments)
        contents, engine = with_engine(contents, arguments.engine or "auto")
        path = build(contents, arguments.store)
        if arguments.sign:
            sign(path, arguments.sign)
    print(f"{_summary(path, packing.unpack(path))}\nserved by: {engine}")
    print(f"try it: python -m server --model-store {arguments.store} --models {contents.card['model']}")
    return 0


@contextmanager
def _progress() -> Iterator[None]:
    """Write each step, and the seconds since the start, as lines on standard error."""
    start = time.time()

    class Steps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _note(f"[{record.created - start:5.1f} s] {record.getMessage()}")

    logger, steps = logging.getLogger("archiver"), Steps()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(steps)
    try:
        yield
        logger.info("done")
    finally:
        logger.removeHandler(steps)
        logger.setLevel(level)


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def _own(arguments: argparse.Namespace) -> Contents:
    classes = read_classes(arguments.classes) if arguments.classes else arguments.labels
    repeated = [label for label, count in Counter(classes).items() if count > 1]
    if repeated:
        print(
            f"warning: several classes have the same label, {repeated[0]!r} first: replies tell them apart by index "
            "alone, metrics count them as one",
            file=sys.stderr,
        )
    return from_network(
        arguments.arch,
        name=arguments.name,
        version=arguments.version,
        description=arguments.description,
        arguments=arguments.arguments,
        state_dict=arguments.state_dict,
        ema=arguments.ema,
        packages=arguments.package,
        seed=arguments.random_weights,
        classes=classes,
        scores=arguments.scores,
        probabilities=arguments.probabilities,
        output=arguments.output,
        tokens=arguments.tokens or "",
        layers=arguments.layers,
        preprocessing=arguments.preprocessing,
        report=_note,
    )


def _check_store(store: Path) -> int:
    lines = check(store)
    for line in lines:
        print(line, file=sys.stderr)
    if any(store.glob("*.mar")) and lines:
        print("rebuild with: python -m archiver --refresh", file=sys.stderr)
    return 1 if lines else 0


def _refresh_store(store: Path, engine: str | None, key: Path | None) -> int:
    archives = sorted(store.glob("*.mar"))
    if not archives:
        raise ArchiveError(f"{store} holds no archive; build one from a checkpoint first")
    for path in archives:
        fresh = refreshed(path, engine)
        changed = fresh != path.read_bytes()
        if changed:
            write(path, fresh)
        said = "rewritten" if changed else "up to date"
        if key:
            said += f", signed in {sign(path, key).name}"
        elif changed and path.with_name(f"{path.name}.sig").exists():
            said += f"; {path.name}.sig is of the archive before: --sign KEY signs it again"
        print(f"{path.name}: {said}")
    return 0


def _summary(path: Path, files: Mapping[str, bytes]) -> str:
    card = json.loads(files[CARD])
    layouts = card.get(LAYOUTS, {})
    layers = ", ".join(
        f"{name} = {node}" + (f" ({layouts[name]})" if name in layouts else "") for name, node in card["layers"].items()
    )
    classes = card["classes"]
    kind = scores_of(card, classes)
    meaning = f", {kind}" + (", which the network gives itself" if card.get(PROBABILITIES) else "")
    named = "numbers" if kind == VALUE else "classes"
    counted = f"{len(classes)}{meaning}" if classes else "none, so maps and no scores"
    if not classes and KIND not in card:
        counted += "; --classes FILE names them"
    without = card.get(NO_GRADIENTS)
    explained = f"\nexplanations: by occlusion, not by gradients: {without}" if without else ""
    return (
        f"{path}  {path.stat().st_size:,} bytes, version {card['version']}\nlayers: {layers}\n"
        f"pictures: {describe(Preprocessing.from_dict(card['preprocessing']))}\n"
        f"{named}: {counted}{explained}"
    )


if __name__ == "__main__":
    sys.exit(main())
