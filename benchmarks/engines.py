"""Compares the engines: one forward pass by every way there is to run it on the CPU, in alternation.

Type: python -m benchmarks.engines --rounds 20

Every round times every engine once, in an order that turns from round to round, so that a machine whose speed drifts
drifts for all; given are the least and the median of the rounds, in microseconds a picture: of this process's CPU time
on one thread, which other work on the machine disturbs less than a clock, and of the clock on several. What is not
installed is left out. `maps` are the scores and all layers below; `difference` is the largest from eager, as a share of
the largest value of that output. `ready` is what making the engine took: export, compilation and loading, in seconds.
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import efficientnet_b0, mobilenet_v3_small, resnet18, resnet50
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from handlers.network.engines.openvino import package
from handlers.networks import Cifar, Digits, Simple

Run = Callable[[Tensor], tuple[Any, ...]]

NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], Mapping[str, str], tuple[int, int, int]]] = {
    "digits": (Digits, Digits.layers, (1, 28, 28)),
    "cifar": (Cifar, Cifar.layers, (3, 32, 32)),
    "simple": (Simple, Simple.layers, (3, 32, 32)),
    # conv1 and layer4.1.conv2 are taken before normalisation and activation: outputs that stand in a fusion's way.
    "resnet18": (resnet18, {"conv1": "conv1", "relu": "relu", "l4": "layer4.1.conv2"}, (3, 224, 224)),
    "resnet50": (resnet50, {"layer2": "layer2.3.relu_2", "layer4": "layer4.2.relu_2"}, (3, 224, 224)),
    "mobilenet_v3_small": (mobilenet_v3_small, {"f3": "features.3.add", "f12": "features.12"}, (3, 224, 224)),
    "efficientnet_b0": (efficientnet_b0, {"f3": "features.3.1.add", "f8": "features.8"}, (3, 224, 224)),
}


class Outputs(nn.Module):
    """A network that returns its scores and the maps of `layers`, as a tuple in that order."""

    def __init__(self, network: nn.Module, layers: Mapping[str, str]) -> None:
        super().__init__()
        scores = get_graph_node_names(network)[1][-1]
        self.nodes = [scores, *layers.values()]
        self.extractor = create_feature_extractor(network, return_nodes=sorted(set(self.nodes)))
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return (N, K) and a map (N, C, h, w) a layer."""
        outputs = self.extractor(images)
        return tuple(outputs[node] for node in self.nodes)


def eager(network: Outputs, example: Tensor) -> Run:
    """Torch as it is."""
    return network


def bfloat16(network: Outputs, example: Tensor) -> Run:
    """Torch with weights and tensors in bfloat16; outputs are float32, as replies need."""
    inner = network.to(torch.bfloat16)
    return lambda images: tuple(output.float() for output in inner(images.bfloat16()))


def channels_last(network: Outputs, example: Tensor) -> Run:
    """Torch with its tensors in the order that its kernels like; maps are put back into C order, as replies need."""
    inner = network.to(memory_format=torch.channels_last)
    return lambda images: tuple(
        output.contiguous() for output in inner(images.contiguous(memory_format=torch.channels_last))
    )


def frozen(network: Outputs, example: Tensor) -> Run:
    """TorchScript, frozen and optimised for inference."""
    traced = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(network, example)))
    return lambda images: traced(images)


def onednn(network: Outputs, example: Tensor) -> Run:
    """Torch with oneDNN's own tensors from end to end, where it has the operations."""
    from torch.utils.mkldnn import to_mkldnn

    inner = to_mkldnn(network)
    return lambda images: tuple(output.to_dense() for output in inner(images.to_mkldnn()))


def compiled(network: Outputs, example: Tensor) -> Run:
    """torch.compile: compiles where it serves, which needs a C++ compiler there."""
    return torch.compile(network, dynamic=True)


def inductor(network: Outputs, example: Tensor) -> Run:
    """AOTInductor: a shared object for this machine's instructions, compiled when the archive is made."""
    program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("N", max=64)},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(tempfile.mkdtemp()) / "network.pt2"))
    return torch._inductor.aoti_load_package(path)


def _onnx(network: Outputs, example: Tensor) -> bytes:
    """Export with all outputs, named by their place."""
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("N")},),
        input_names=["images"],
        output_names=[str(number) for number in range(len(network.nodes))],
        verbose=False,
    )
    return program.model_proto.SerializeToString()


def onnx_runtime(network: Outputs, example: Tensor) -> Run:
    """ONNX Runtime with all outputs in one session, those asked for being returned."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(_onnx(network, example), options)
    return lambda images: session.run(None, {"images": images.numpy()})


def openvino(network: Outputs, example: Tensor, precision: str = "f32") -> Run:
    """OpenVINO with all outputs in one model; outputs are copied, as a request must own them."""
    core = package().Core()
    model = core.compile_model(
        core.read_model(io.BytesIO(_onnx(network, example))),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        },
    )
    return lambda images: tuple(model(images.numpy()).values())


ENGINES = {
    "eager": eager,
    "bfloat16": bfloat16,
    "channels_last": channels_last,
    "jit frozen": frozen,
    "oneDNN": onednn,
    "compile": compiled,
    "AOTInductor": inductor,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
    "OpenVINO bfloat16": partial(openvino, precision="bf16"),
}


def alternate(ways: Sequence[Callable[[], object]], rounds: int, seconds: float = 0.02) -> list[list[float]]:
    """Return the microseconds of a call of each way in each round; the order turns."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in ways]
    for number in range(rounds):
        for way, found in list(zip(ways, times, strict=True))[:: 1 if number % 2 else -1]:
            began, calls, taken = clock(), 0, 0.0
            while taken < seconds:
                way()
                calls += 1
                taken = clock() - began
            found.append(taken / calls * 1e6)
    return times


def difference(found: tuple[Any, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest difference of any output, as a share of that output's largest value."""
    pairs = [(np.asarray(one), np.asarray(other)) for one, other in zip(found, expected, strict=True)]
    return max(float(np.abs(one - other).max() / np.abs(other).max()) for one, other in pairs)


def make(engine: str, network: str, *, maps: bool) -> Run:
    """Return a way to run a network, which has run once."""
    constructor, layers, shape = NETWORKS[network]
    torch.manual_seed(0)
    example = torch.rand(2, *shape)
    torch.manual_seed(0)
    with torch.inference_mode() if engine == "eager" else torch.no_grad():
        run = ENGINES[engine](Outputs(constructor().eval(), layers if maps else {}), example)
        run(example)
    return run


def main() -> None:
    """Measure, and print a line of microseconds a picture for each network, batch and set of outputs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    engines = options.engines.split(",")
    off, ready_s = dict.fromkeys(engines, 0.0), dict.fromkeys(engines, 0.0)  # The largest of each engine.
    print(f"| network | batch | outputs | {' | '.join(engines)} |\n|---|---|---{'|---' * len(engines)}|")
    for network, maps in itertools.product(options.networks.split(","), (False, True)):
        runs: dict[str, Run] = {}
        for engine in engines:
            began = time.perf_counter()
            try:
                runs[engine] = make(engine, network, maps=maps)
            except Exception as err:  # Whatever an engine cannot do, it is left out and said so.
                said = f"{type(err).__name__}: {str(err).splitlines()[0][:120]}"
                print(f"{network}: {engine} does not run: {said}", file=sys.stderr)
            ready_s[engine] = max(ready_s[engine], time.perf_counter() - began)
        for batch in map(int, options.batches.split(",")):
            images = torch.rand(batch, *NETWORKS[network][2])
            with torch.inference_mode():
                expected = runs["eager"](images)
                for engine, run in runs.items():  # Each compiles for this batch.
                    off[engine] = max(off[engine], difference(run(images), expected))
                times = alternate([partial(run, images) for run in runs.values()], options.rounds)
            cells = dict.fromkeys(engines, "–") | {
                engine: f"{min(found) / batch:,.0f} / {statistics.median(found) / batch:,.0f}"
                for engine, found in zip(runs, times, strict=True)
            }
            outputs = "maps" if maps else "scores"
            print(f"| {network} | {batch} | {outputs} | {' | '.join(cells.values())} |", flush=True)
    for engine in engines:
        print(f"\n{engine}: difference up to {off[engine]:.1e}, ready after up to {ready_s[engine]:.1f} s")
    print(f"\ntorch {torch.__version__}, {options.rounds} rounds, threads: {options.threads}")


if __name__ == "__main__":
    main()
