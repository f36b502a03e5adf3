"""The sub-command `convscope export`.

    convscope export pictures/ --model cifar --layer conv1,conv2 --pool 1 --out features.parquet
    convscope export shards/*.tar --model cifar --layer conv2 --out maps.zarr

`convscope` finds it through the entry point in pyproject.toml. numpy is imported on first use.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from convscope.commands import (
    MODEL_HELP,
    PICTURE_HELP,
    SubParsers,
    UsageError,
    at_least,
    format_json,
    parse_model_name,
    parse_names,
    printable,
    reject_unused,
)

if TYPE_CHECKING:
    from convscope import Client


def add_export(commands: SubParsers) -> argparse.ArgumentParser:
    """Add `convscope export`."""
    parser = commands.add_parser(
        "export", help="features and scores of any number of pictures, as Parquet, .npy shards or Zarr"
    )
    parser.add_argument(
        "pictures",
        nargs="+",
        metavar="PICTURE|FOLDER|TAR|CSV|-",
        help=f"{PICTURE_HELP}; .tar files of pictures; .csv files with a column `path`",
    )
    parser.add_argument("--model", required=True, type=parse_model_name, help=MODEL_HELP)
    parser.add_argument(
        "--layer",
        "--layers",
        dest="layers",
        type=parse_names,
        metavar="A,B|all",
        help="layers whose maps to write, a column for each (default: none)",
    )
    parser.add_argument("--pool", type=at_least(1), metavar="P", help="average maps down to P x P cells")
    parser.add_argument(
        "--map-dtype", choices=("float32", "float16"), help="dtype of maps, on the wire and written (default: float32)"
    )
    parser.add_argument("--all-scores", action="store_true", help="write probabilities and logits of all classes too")
    parser.add_argument(
        "--out", required=True, help="features.parquet, maps.zarr, or a folder without suffix for .npy shards"
    )
    parser.add_argument(
        "--rows-per-part",
        type=at_least(1),
        metavar="N",
        help="rows written at a time: a row group, shard or chunk (default: 1024, or as many as fit into 16 MiB)",
    )
    parser.add_argument(
        "--concurrency", default=4, type=at_least(1), metavar="N", help="concurrent requests (default %(default)s)"
    )
    parser.add_argument(
        "--batch", type=at_least(1), metavar="N", help="pictures per request (default: 8, or as many as a reply holds)"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--skip-existing", action="store_true", help="do nothing if OUT is complete")
    existing.add_argument("--overwrite", action="store_true", help="replace OUT, and begin an interrupted export again")
    parser.set_defaults(run=_export)
    return parser


def _export(client: Client, options: argparse.Namespace) -> int:
    from convscope_lens._export.export import export

    if options.layers is None:
        reject_unused(options, ["pool", "map_dtype"], "without --layer")
    parts = Path(f"{Path(options.out)}.parts")
    try:
        result = export(
            client,
            options.pictures,
            options.out,
            model=options.model,
            version=options.version,
            layers=options.layers or (),
            pool=options.pool,
            map_dtype=options.map_dtype or "float32",
            all_scores=options.all_scores,
            concurrency=options.concurrency,
            batch=options.batch,
            rows_per_part=options.rows_per_part,
            existing="skip" if options.skip_existing else "overwrite" if options.overwrite else "error",
            progress=sys.stderr is not None and sys.stderr.isatty(),
        )
    except ImportError as error:
        raise UsageError(str(error)) from error
    except BaseException as error:
        if (parts / "settings.json").exists() and not isinstance(error, ValueError):  # Which only --overwrite helps.
            command = "the same command" + " without --overwrite" * options.overwrite
            print(printable(f"{parts} keeps the rows so far; {command} resumes the export"), file=sys.stderr)
        raise
    if options.json:
        print(format_json({**result._asdict(), "out": str(result.out)}))
    else:
        resumed = f", {result.resumed:,} of them from an earlier run" if result.resumed else ""
        failed = f"; {result.failed:,} are errors, see the column error_code" if result.failed else ""
        print(printable(f"wrote {result.out}: {result.rows:,} rows{resumed}{failed}"))
    return 1 if result.failed else 0
