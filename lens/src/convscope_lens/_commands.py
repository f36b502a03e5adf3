"""The sub-commands that this package adds to `convscope`.

    convscope report cat.png --model cifar --out report.html
    convscope report pictures/ --model cifar --out reports
    convscope ui --model cifar,digits
    convscope probe shift pictures/ --model cifar --save probes
    convscope filters cifar --save filters
    convscope strongest samples/*.png --model cifar --layer conv2 --channel 3 --save patches
    convscope ablate samples/cat.png --model cifar --layer conv2 --save ablations
    convscope patch cat.png dog.png --model cifar --save traces
    convscope survey pictures/ --model deep --out portrait.html

`convscope` finds them through the entry points in pyproject.toml. numpy and matplotlib are imported on first use.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from convscope.commands import (
    METHOD_HELP,
    METHODS,
    MODEL_HELP,
    PICTURE_HELP,
    STANDARD_INPUT,
    PictureFailure,
    SubParsers,
    UsageError,
    add_request_id,
    at_least,
    ensure_missing,
    ensure_writable,
    find_target,
    format_json,
    format_table,
    list_pictures,
    parse_model_name,
    parse_model_names,
    parse_name,
    parse_names,
    printable,
    read_picture_files,
    reject_unused,
)

if TYPE_CHECKING:
    from convscope import Client, ConvscopeError

    from convscope_lens._page.report import Options
    from convscope_lens.interventions import Ablation, Trace
    from convscope_lens.patches import Patch
    from convscope_lens.probes import ProbeResult


class ProbeCommand(NamedTuple):
    """A probe on the command line.

    Attributes:
        steps_argument: Argument of the probe that `--steps` sets; None if it has no steps.
        help: Help text of the command, one line.
        integer_steps: Whether the steps are whole pixels.
    """

    steps_argument: str | None
    help: str
    integer_steps: bool = False


# Not in `probes`, whose import takes numpy: --help must be fast.
PROBES = {
    "shift": ProbeCommand("shifts", "measure maps and predictions of shifted pictures; steps are pixels", True),
    "rotate": ProbeCommand("angles", "measure scores and maps of rotated pictures; steps are degrees"),
    "scale": ProbeCommand("factors", "measure scores and maps of scaled pictures; steps are factors"),
    "border": ProbeCommand(None, "measure how padding changes maps near the border; has no steps"),
    "pool": ProbeCommand("windows", "measure pooled maps of pictures shifted by a pixel; steps are cells", True),
    "blur": ProbeCommand("sigmas", "measure scores and maps of blurred pictures; steps are pixels (sigma)"),
    "shuffle": ProbeCommand("blocks", "measure scores and maps of block-shuffled pictures; steps are pixels", True),
}


def add_report(commands: SubParsers) -> argparse.ArgumentParser:
    """Add `convscope report`."""
    parser = commands.add_parser("report", help="scores, maps and heat map of pictures, as HTML files")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE|FOLDER|-", help=PICTURE_HELP)
    parser.add_argument("--model", required=True, type=parse_model_name, help=MODEL_HELP)
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE|DIR",
        help="the HTML file to write; for several pictures or a folder, the folder for index.html and a page each",
    )
    parser.add_argument(
        "--layers", default="all", type=parse_names, metavar="A,B|all", help="layers to show (default %(default)s)"
    )
    methods = (*METHODS, "none")
    parser.add_argument("--method", default="grad_cam", choices=methods, help=METHOD_HELP)
    parser.add_argument(
        "--layer", type=parse_name, help="layer that grad_cam and cam use (default: the last one with several cells)"
    )
    parser.add_argument("--target", metavar="CLASS", help="index or label of the class (default: the most probable)")
    parser.add_argument(
        "--top-k", default=5, type=at_least(0), metavar="K", help="scores to show, 0 for all (default %(default)s)"
    )
    add_request_id(parser)
    parser.set_defaults(run=_report)
    return parser


def _report(client: Client, options: argparse.Namespace) -> int:
    from convscope_lens._page.report import Options, report

    method = None if options.method == "none" else options.method
    target = find_target(client, options)
    shared = Options(options.version, options.layers, method, options.layer, target, options.top_k)
    out = Path(options.out)
    [first, *others] = options.pictures
    if others or Path(first).is_dir() or out.is_dir():
        if options.request_id is not None:
            raise UsageError("--request-id names one request: use it with one picture and a file as --out")
        return _report_many(client, options, list_pictures(options.pictures), out, shared)
    page = report(
        client, _picture(first), model=options.model, request_id=options.request_id, **shared._asdict()
    ).encode()
    out.write_bytes(page)
    written = {"report": options.out, "bytes": len(page)}
    print(format_json(written) if options.json else printable(f"wrote {options.out}, {len(page):,} bytes"))
    return 0


def _picture(path: str) -> str | bytes:
    """Return a path as it is, and for `-` what standard input holds."""
    return sys.stdin.buffer.read() if path == STANDARD_INPUT else path


def _report_many(
    client: Client, options: argparse.Namespace, pictures: list[str], folder: Path, shared: Options
) -> int:
    """Write a page for each picture and an index; a picture that fails does not stop the others."""
    from convscope_lens._page.report import write_reports

    if folder.suffix == ".html":
        raise UsageError(f"--out must be a folder for {len(pictures)} pictures, not {options.out}")
    results = []
    for written in write_reports(client, pictures, folder, model=options.model, options=shared):
        results.append(written)
        if not options.json:
            outcome = written.error if written.page is None else str(folder / written.page)
            print(printable(f"{len(results)} of {len(pictures)}: {written.picture}: {outcome}"), flush=True)
    index = str(folder / "index.html")
    if options.json:
        rows = [{"picture": str(one.picture), "page": one.page, "error": one.error} for one in results]
        print(format_json({"index": index, "reports": rows}))
    else:
        print(printable(f"wrote {index}"))
    return 1 if any(one.error is not None for one in results) else 0


def add_ui(commands: SubParsers) -> argparse.ArgumentParser:
    """Add `convscope ui`."""
    parser = commands.add_parser("ui", help="local web page: drop or draw a picture")
    parser.add_argument(
        "--model",
        required=True,
        type=parse_model_names,
        metavar="A,B",
        help="models to choose from, the first one to begin with",
    )
    parser.add_argument("--port", default=0, type=int, help="port on 127.0.0.1 (default: a free port)")
    parser.set_defaults(run=_ui)
    return parser


def _ui(client: Client, options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C or SIGTERM."""
    from convscope_lens._page.server import PageServer

    if not 0 <= options.port < 1 << 16:
        raise UsageError(f"--port must be 0 to 65535, not {options.port}")
    # Shells start background jobs with SIGINT ignored; install our handlers explicitly.
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.default_int_handler)
    with (
        contextlib.suppress(KeyboardInterrupt),
        PageServer(client, options.model, version=options.version, port=options.port) as server,
    ):
        text = json.dumps({"url": server.url}) if options.json else f"open {server.url}\npress Ctrl-C to stop"
        print(text, flush=True)
        server.serve_forever()
    return 0


def add_probe(commands: SubParsers) -> argparse.ArgumentParser:
    """Add `convscope probe`."""
    parser = commands.add_parser(
        "probe",
        help="measure how scores and maps change when pictures are shifted, rotated, scaled, blurred or shuffled",
        description="\n".join(f"{kind}: {probe.help}" for kind, probe in PROBES.items())
        + "\n\nA figure is printed with half of its 95 % interval over the pictures and, in parentheses, its baseline.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=PROBES, metavar="|".join(PROBES))
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help=PICTURE_HELP)
    parser.add_argument("--model", required=True, type=parse_model_name, help=MODEL_HELP)
    parser.add_argument(
        "--layers",
        default="all",
        type=parse_names,
        metavar="A,B|all|none",
        help="layers to use, none for scores alone (default %(default)s)",
    )
    parser.add_argument(
        "--against",
        type=parse_model_name,
        metavar="MODEL",
        help="probe another model with the same pictures too, and print the paired difference",
    )
    parser.add_argument(
        "--steps", type=parse_numbers, metavar="A,B,...", help="shifts, angles, factors, ... (units above)"
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="use a random sample of N pictures")
    parser.add_argument(
        "--seed", default=0, type=at_least(0), metavar="N", help="seed of all random choices (default %(default)s)"
    )
    parser.add_argument(
        "--margin", type=at_least(1), metavar="PX", help="border: pixels to cut off at each edge (default: a quarter)"
    )
    parser.add_argument(
        "--background", type=parse_share, metavar="X", help="border: value of the background, 0 to 1 (default 0.5)"
    )
    parser.add_argument("--save", metavar="DIR", help="write <kind>-<model>.png and .json to DIR")
    parser.set_defaults(run=_probe)
    return parser


def parse_numbers(text: str) -> list[float]:
    """Type for argparse: comma-separated finite numbers, such as `1,2,4`."""
    try:
        numbers = [float(item) for item in text.split(",") if item.strip()]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,2,4, not {text!r}")
    return numbers


def parse_share(text: str) -> float:
    """Type for argparse: a number from 0 to 1."""
    [number, *others] = parse_numbers(text)
    if others or not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, not {text!r}")
    return number


def _probe(client: Client, options: argparse.Namespace) -> int:
    arguments: dict[str, Any] = {}
    name, _, integer_steps = PROBES[options.kind]
    if name is None:
        reject_unused(options, ["steps"], f"with {options.kind}")
    if options.kind != "border":
        reject_unused(options, ["margin", "background"], f"with {options.kind}")
    arguments |= {key: value for key in ("margin", "background") if (value := getattr(options, key)) is not None}
    if name is not None and options.steps is not None:
        if integer_steps and any(step != int(step) for step in options.steps):
            raise UsageError(
                f"--steps of {options.kind} must be whole {'cells' if options.kind == 'pool' else 'pixels'}"
            )
        arguments[name] = [int(step) for step in options.steps] if integer_steps else options.steps
    if options.save is not None:
        ensure_writable(Path(options.save))
    pictures = list(map(_picture, list_pictures(options.pictures)))
    from convscope_lens import probes

    def run(model: str, version: str | None) -> probes.ProbeResult:
        result: probes.ProbeResult = getattr(probes, options.kind)(
            client,
            pictures,
            model=model,
            version=version,
            layers=options.layers,
            limit=options.limit,
            seed=options.seed,
            **arguments,
        )
        return result

    result = run(options.model, options.version)
    values, tables = result.to_dict(), [result.format_table()]
    if options.against is not None:
        other = run(options.against, None)
        difference = result.minus(other)
        values |= {"against": other.to_dict(), "difference": difference.to_dict()}
        tables += [other.format_table(), difference.format_table()]
    print(format_json(values) if options.json else "\n\n".join(tables))
    if options.save is not None:
        _save_result(result, values, f"{result.name}-{Path(result.model).name}", options)
    return 0


def add_filters(commands: SubParsers) -> argparse.ArgumentParser:
    """Add `convscope filters`."""
    parser = commands.add_parser("filters", help="filters of a convolution: weights and peak frequency")
    parser.add_argument("model", type=parse_model_name, help=MODEL_HELP)
    parser.add_argument("--layer", metavar="NAME", help="the layer (default: the model's first layer)")
    parser.add_argument("--save", metavar="DIR", help="write <model>-<layer>-filters.png and -spectra.png to DIR")
    add_request_id(parser)
    parser.set_defaults(run=_filters)
    return parser


def _filters(client: Client, options: argparse.Namespace) -> int:
    from convscope_lens.filters import draw_filters, draw_spectra, drawn_kernels, format_peaks, peaks

    if options.save is not None:
        ensure_writable(Path(options.save))

    layer = options.layer or client.model_card(options.model, options.version).layers[0].name
    filters = client.filters(options.model, layer, options.version, request_id=options.request_id)
    filter_peaks = peaks(filters)
    if options.json:
        fields = {"model": options.model, "layer": layer, "shape": list(filters.shape), "filters": filters.tolist()}
        print(format_json(fields | {"peaks": [dataclasses.asdict(peak) for peak in filter_peaks]}, indent=None))
    else:
        print(format_peaks(filter_peaks, f"{options.model}, {layer}: {'×'.join(map(str, filters.shape))} filters"))
    if options.save is not None:
        folder = Path(options.save)
        stem = f"{Path(options.model).name}-{Path(layer).name}"
        title = f"{options.model}, {layer}"
        bgr = client.model_card(options.model, options.version).input.bgr
        draw_filters(filters, title=title, bgr=bgr).savefig(folder / f"{stem}-filters.png", dpi=110)
        draw_spectra(filters, title=title).savefig(folder / f"{stem}-spectra.png", dpi=110)
        if not options.json:
            drawn = drawn_kernels(filters).text
            print("\n" + printable(f"saved {folder / stem}-filters.png and -spectra.png: {drawn}"))
    return 0


def add_strongest(commands: SubParsers) -> argparse.ArgumentParser:
    """Add `convscope strongest`."""
    parser = commands.add_parser("strongest", help="the patches of pictures that activate a channel most")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help=PICTURE_HELP)
    parser.add_argument("--model", required=True, type=parse_model_name, help=MODEL_HELP)
    parser.add_argument("--layer", required=True, type=parse_name)
    parser.add_argument("--channel", required=True, type=at_least(0), metavar="C")
    parser.add_argument("-n", default=9, type=at_least(1), metavar="N", help="number of patches (default %(default)s)")
    parser.add_argument(
        "--per-picture",
        default=1,
        type=at_least(1),
        metavar="N",
        help="maximum patches per picture (default %(default)s)",
    )
    parser.add_argument("--save", metavar="DIR", help="write each patch as a PNG to a new directory")
    parser.set_defaults(run=_strongest)
    return parser


def _strongest(client: Client, options: argparse.Namespace) -> int:
    from convscope_lens.patches import strongest_patches

    if options.save is not None:
        ensure_missing(Path(options.save))
        ensure_writable(Path(options.save).parent)
    names: list[str] = []
    failed: list[tuple[str, PictureFailure]] = []

    def files() -> Iterator[bytes]:
        for name, file in read_picture_files(options.pictures):
            if isinstance(file, PictureFailure):
                failed.append((name, file))
            else:
                names.append(name)
                yield file

    def on_error(index: int, error: ConvscopeError) -> None:
        failed.append((names[index], PictureFailure(error.code, error.message)))

    patches = strongest_patches(
        client,
        files(),
        model=options.model,
        version=options.version,
        layer=options.layer,
        channel=options.channel,
        n=options.n,
        per_picture=options.per_picture,
        on_error=on_error,
    )
    named = [(names[patch.picture_index], patch) for patch in patches]
    saved = [] if options.save is None else _save_patches(patches, Path(options.save))
    if options.json:
        print(format_json(_patches_json(named, failed, saved)))
    else:
        print(_format_patches(named, failed, saved))
    return 1 if failed else 0


def _save_patches(patches: list[Patch], folder: Path) -> list[Path]:
    """Write each patch as a PNG to a new folder, named by its rank."""
    from convscope.pixels import encode_png

    folder.mkdir()
    files = [folder / f"{rank:03}.png" for rank in range(1, len(patches) + 1)]
    for file, patch in zip(files, patches, strict=True):
        pixels = patch.display_pixels()
        file.write_bytes(encode_png(pixels if pixels.shape[2] in (1, 3) else pixels[:, :, :1]))
    return files


def _format_patches(
    patches: list[tuple[str, Patch]], failed: list[tuple[str, PictureFailure]], saved: list[Path]
) -> str:
    """Format patches as a table, followed by the failed pictures."""
    rows = []
    for rank, (picture, patch) in enumerate(patches, 1):
        top, left, bottom, right = _whole_pixels(patch.original_box or patch.box)
        position = [f"{patch.cell[0]}, {patch.cell[1]}", f"{top} to {bottom - 1}, {left} to {right - 1}"]
        rows.append([str(rank), f"{patch.value:.4g}", picture, *position])
    rows += [["–", "–", picture, str(error)] for picture, error in failed]
    of_input = any(patch.original_box is None for _, patch in patches)
    header = ["rank", "value", "picture", "cell", f"{'input ' * of_input}pixels (rows, columns)"]
    text = format_table(header, rows, right_aligned=(0, 1))
    return f"{text}\n\nsaved {printable(str(saved[0].parent))}" if saved else text


def _whole_pixels(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """Return the pixels that a box touches, bottom and right exclusive."""
    # The edges come out of a division: a millionth of a pixel is no pixel.
    top, left = (math.floor(edge + 1e-6) for edge in box[:2])
    bottom, right = (math.ceil(edge - 1e-6) for edge in box[2:])
    return top, left, bottom, right


def _patches_json(
    patches: list[tuple[str, Patch]], failed: list[tuple[str, PictureFailure]], saved: list[Path]
) -> dict[str, Any]:
    """Return patches as JSON types, without pixels, and the failed pictures."""
    rows = []
    for rank, (picture, patch) in enumerate(patches):
        fields = {field.name: getattr(patch, field.name) for field in dataclasses.fields(patch)}
        del fields["pixels"], fields["picture_index"]
        rows.append(fields | {"picture": picture, "saved": str(saved[rank]) if saved else None})
    return {
        "patches": rows,
        "failed": [{"picture": picture, "error": error._asdict()} for picture, error in failed],
    }


def add_ablate(commands: SubParsers) -> argparse.ArgumentParser:
    """Add `convscope ablate`."""
    parser = commands.add_parser(
        "ablate", help="which channels carry a class: the change of its logit as each channel is set to zero"
    )
    parser.add_argument("pictures", nargs="+", metavar="PICTURE|FOLDER|-", help=PICTURE_HELP)
    parser.add_argument("--model", required=True, type=parse_model_name, help=MODEL_HELP)
    parser.add_argument("--layer", required=True, type=parse_name)
    parser.add_argument(
        "--target", metavar="CLASS", help="index or label of the class (default: each picture's most probable)"
    )
    parser.add_argument(
        "--slopes",
        action="store_true",
        help="measure gradient × activation too, and its rank correlation (twice the forward passes)",
    )
    parser.add_argument("-n", default=20, type=at_least(1), help="channels to print (default %(default)s)")
    parser.add_argument("--save", metavar="DIR", help="write ablate-<model>-<layer>.png and .json to DIR")
    parser.set_defaults(run=_ablate)
    return parser


def _ablate(client: Client, options: argparse.Namespace) -> int:
    from convscope_lens.interventions import ablate

    if options.save is not None:
        ensure_writable(Path(options.save))
    target = find_target(client, options)
    pictures = list(read_picture_files(options.pictures))
    failed = [(name, file) for name, file in pictures if isinstance(file, PictureFailure)]
    readable = [(name, file) for name, file in pictures if isinstance(file, bytes)]

    def on_error(index: int, error: ConvscopeError) -> None:
        failed.append((readable[index][0], PictureFailure(error.code, error.message)))

    result = None
    if readable:
        result = ablate(
            client,
            [file for _, file in readable],
            model=options.model,
            layer=options.layer,
            target=target,
            slopes=options.slopes,
            version=options.version,
            on_error=on_error,
        )
    if options.json:
        failures = [{"picture": picture, "error": error._asdict()} for picture, error in failed]
        print(format_json({**(result.to_dict() if result else {}), "failed": failures}))
    else:
        print("\n".join([*([result.format_table(options.n)] if result else []), *_failure_lines(failed)]))
    if result is not None and options.save is not None:
        stem = f"ablate-{Path(result.model).name}-{Path(result.layer).name}"
        _save_result(result, result.to_dict(), stem, options)
    return 1 if failed else 0


def _failure_lines(failed: list[tuple[str, PictureFailure]]) -> list[str]:
    return [printable(f"{picture}: {error}") for picture, error in failed]


def add_patch(commands: SubParsers) -> argparse.ArgumentParser:
    """Add `convscope patch`."""
    parser = commands.add_parser(
        "patch",
        help="causal tracing: which layer and region of one picture's maps restores its answer in another's run",
    )
    parser.add_argument("clean", metavar="CLEAN", help="whose answer is to be restored: a PNG, JPEG, WebP or .npy file")
    parser.add_argument("corrupt", metavar="CORRUPT", help="whose maps are replaced, region by region")
    parser.add_argument("--model", required=True, type=parse_model_name, help=MODEL_HELP)
    parser.add_argument(
        "--layers", default=["all"], type=parse_names, metavar="A,B|all", help="layers to trace (default all)"
    )
    parser.add_argument(
        "--target", metavar="CLASS", help="index or label of the class (default: CLEAN's most probable)"
    )
    parser.add_argument(
        "--grid",
        default=8,
        type=at_least(1),
        metavar="N",
        help="rows and columns of regions per map (default %(default)s)",
    )
    parser.add_argument("--save", metavar="DIR", help="write patch-<model>.png and .json to DIR")
    parser.set_defaults(run=_patch)
    return parser


def _patch(client: Client, options: argparse.Namespace) -> int:
    from convscope_lens.interventions import trace

    if options.save is not None:
        ensure_writable(Path(options.save))
    if options.clean == options.corrupt == STANDARD_INPUT:
        raise UsageError("- can be given once: standard input is one picture")
    result = trace(
        client,
        _picture(options.clean),
        _picture(options.corrupt),
        model=options.model,
        layers=options.layers,
        target=find_target(client, options),
        grid=options.grid,
        version=options.version,
    )
    print(format_json(result.to_dict()) if options.json else result.format_table())
    if options.save is not None:
        _save_result(result, result.to_dict(), f"patch-{Path(result.model).name}", options)
    return 0


def _save_result(
    result: Ablation | Trace | ProbeResult, values: dict[str, Any], stem: str, options: argparse.Namespace
) -> None:
    """Write the figure of a result, and its JSON; those of an earlier run are replaced."""
    folder = Path(options.save)
    (folder / f"{stem}.json").write_text(format_json(values) + "\n", "utf-8")
    result.figure().savefig(folder / f"{stem}.png", dpi=110)
    if not options.json:
        print("\n" + printable(f"saved {folder / stem}.png and .json"))


def add_survey(commands: SubParsers) -> argparse.ArgumentParser:
    """Add `convscope survey`."""
    parser = commands.add_parser(
        "survey", help="a data set's portrait: what each channel does over all pictures of a folder"
    )
    parser.add_argument("folder", metavar="FOLDER", help="pictures; the classes are its subfolders, if there are any")
    parser.add_argument("--model", required=True, type=parse_model_name, help=MODEL_HELP)
    parser.add_argument(
        "--layers", default=["all"], type=parse_names, metavar="A,B|all", help="layers to measure (default all)"
    )
    parser.add_argument(
        "--k", default=9, type=at_least(1), help="strongest cells of each channel (default %(default)s)"
    )
    parser.add_argument(
        "--shuffles",
        default=20,
        type=at_least(1),
        metavar="N",
        help="shuffles of the classes, which give the selectivity by chance (default %(default)s)",
    )
    parser.add_argument(
        "--seed", default=0, type=at_least(0), metavar="N", help="seed of all random choices (default %(default)s)"
    )
    parser.add_argument(
        "--map-dtype",
        default="float16",
        choices=("float16", "float32"),
        help="dtype of maps on the wire (default %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", help="write the HTML page to FILE")
    parser.add_argument("--save-json", metavar="FILE", help="write what --json prints to FILE")
    parser.set_defaults(run=_survey)
    return parser


def _survey(client: Client, options: argparse.Namespace) -> int:
    from convscope_lens._page.portrait import portrait
    from convscope_lens.surveys import survey

    for file in filter(None, (options.out, options.save_json)):
        ensure_writable(Path(file).parent)
    result = survey(
        client,
        options.folder,
        model=options.model,
        layers=options.layers,
        k=options.k,
        shuffles=options.shuffles,
        seed=options.seed,
        map_dtype=options.map_dtype,
        version=options.version,
        progress=sys.stderr is not None and sys.stderr.isatty(),
    )
    written = []
    if options.save_json is not None:
        Path(options.save_json).write_text(format_json(result.to_dict(), indent=None) + "\n", "utf-8")
        written.append(options.save_json)
    if options.out is not None:
        Path(options.out).write_text(portrait(client, result), "utf-8")
        written.append(options.out)
    if options.json:
        print(format_json(result.to_dict(), indent=None))
    else:
        lines = [f"wrote {file}, {Path(file).stat().st_size:,} bytes" for file in written]
        print("\n".join([result.format_table(), "", *_failure_lines(list(result.failed)), *map(printable, lines)]))
    return 1 if result.failed else 0
