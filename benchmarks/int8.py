"""INT8: an archive's network quantised after training by NNCF, beside float32 and bfloat16 on the CPU, one thread.

    pip install --no-deps --target build/nncf nncf==3.4.0 pydot tabulate
    PYTHONPATH=build/nncf python -m benchmarks.int8 model_store/deep.mar --train build/cifar10/train \
      --test build/cifar10/test

NNCF calibrates on 300 pictures of `--train`, evenly spaced, or on ten of noise, which will do for the time alone. The
table of accuracy is that of `precision_accuracy`, beside OpenVINO in float32; `scores` are engines of a graph without
maps. Every round times every engine once, for 0.1 s or one pass, beginning with the next one each time. Given are
medians of the rounds, the quartiles in brackets: of this process's CPU time in milliseconds a picture, and of the gain
over bfloat16, a ratio within a round. The last line is what the server's check at its start would say.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.precision_accuracy import pictures, table
from handlers.images.decoding import decode
from handlers.images.preprocessing import noise, to_input
from handlers.network import archive as archives
from handlers.network.engines import reference
from handlers.network.engines.engine import Engine
from handlers.network.engines.onnx import Session
from handlers.network.engines.openvino import Compiled, package

CALIBRATION = 300


def quantise(graph: Path, images: Sequence[NDArray[np.float32]]) -> dict[str, Any]:
    """Return OpenVINO's models of a graph with convolutions in INT8, calibrated on images (1, C, H, W)."""
    openvino = package()
    import nncf  # After `package`, so that it finds no telemetry either.
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    ranges = nncf.AdvancedQuantizationParameters(activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX)
    ways: dict[str, Any] = {
        "INT8": {"fast_bias_correction": False, "advanced_parameters": ranges},
        "INT8 by default": {},
    }
    return {  # `convert_model` folds batch normalisation into convolutions, unlike `read_model`.
        way: nncf.quantize(openvino.convert_model(graph), nncf.Dataset(images), subset_size=len(images), **options)
        for way, options in ways.items()
    }


def time_in_turns(runs: Sequence[Callable[[], object]], rounds: int, seconds: float = 0.1) -> NDArray[np.float64]:
    """Return the CPU time of a call in milliseconds, (runs, rounds)."""
    times = np.empty((len(runs), rounds))
    for run in runs:
        run()
    for number in range(rounds):
        for place in np.roll(range(len(runs)), -number):
            began, calls, taken = time.process_time(), 0, 0.0
            while taken < seconds:
                runs[place]()
                calls += 1
                taken = time.process_time() - began
            times[place, number] = taken / calls * 1e3
    return times


def _spread(values: NDArray[np.float64]) -> str:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def main() -> None:
    """Print a table of accuracy, if there are pictures, and one of times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--train", type=Path, help="a folder of pictures, as precision_accuracy takes it")
    parser.add_argument("--test", type=Path, help="the same")
    parser.add_argument("--most", type=int, default=10_000, help="pictures to test, evenly spaced")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    name, openvino = options.archive.stem, package()
    with tempfile.TemporaryDirectory() as unpacked:
        folder = Path(unpacked)
        zipfile.ZipFile(options.archive).extractall(folder)
        archive = archives.load(folder)
        assert archive.graph is not None, "the archive has no graph"
        trial = noise(archive.preprocessing, 10)
        images = list(trial[:, None])
        if options.train:
            files, _ = pictures(options.train, CALIBRATION)
            read = (decode(file.read_bytes(), archive.preprocessing)[0] for file in files)
            images = [to_input([picture], archive.preprocessing) for picture in read]
        models = {"float32": openvino.Core().read_model(archive.graph), **quantise(archive.graph, images)}

        def engine(way: str, layers: Mapping[str, str], precision: str = "float32") -> Compiled:
            model, file = models[way], folder / f"{way}-{len(layers)}.xml"
            if not layers:
                model = openvino.Model([model.outputs[0].node], model.get_parameters(), "scores")
            if not file.exists():  # An engine may still read its weights from there.
                openvino.save_model(model, file, compress_to_fp16=False)
            made = Compiled(file, layers, trial, has_scores=True, layouts=archive.layouts, precision=precision)
            made.name = f"{precision if way == 'float32' else way}, {'maps' if layers else 'scores'}"
            return made

        outputs: dict[str, Mapping[str, str]] = {"scores": {}, f"and {len(archive.layers)} maps": archive.layers}
        if options.test:
            engines = [engine("float32", archive.layers)]
            engines += [engine("float32", layers, "bfloat16") for layers in outputs.values()]
            engines += [engine(way, layers) for way in list(models)[1:] for layers in outputs.values()]
            print(table(name, archive, engines, *pictures(options.test, options.most)), flush=True)
        print("| network | outputs | pictures | engine | ms a picture | gain over bfloat16 |\n" + "|---" * 6 + "|")
        for what, layers in outputs.items():
            ways: list[Engine] = [Session(archive.graph, archive.layers, has_scores=True, layouts=archive.layouts)]
            ways += [engine("float32", layers), engine("float32", layers, "bfloat16"), engine("INT8", layers)]
            for batch in (1, 8):
                runs = [partial(way.run, trial[:batch], frozenset(layers)) for way in ways]
                times = time_in_turns(runs, options.rounds) / batch
                for way, own in zip(ways, times, strict=True):
                    row = f"{name} | {what} | {batch} | {way.name} | {_spread(own)} | {_spread(times[2] / own)}"
                    print(f"| {row} |", flush=True)
        try:
            found = reference.take(ways[-1], trial[: reference.PICTURES])
            reference.compare(found, reference.read(folder / archives.REFERENCE), reference.TOLERANCES["bfloat16"])
            print("INT8 keeps bfloat16's bound of the check at a start")
        except RuntimeError as err:
            print(f"INT8 fails bfloat16's bound of the check at a start: {err}")


if __name__ == "__main__":
    main()
