"""The networks of the table, and the command that archives each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OWN = Path(__file__).with_name("own")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Case:
    """A network of the table.

    Attributes:
        name: Name that it is served under.
        family: `torchvision`, `timm` or `own`.
        build: `torchvision:NAME`, `timm:NAME`, or `module:Class` in a file or folder of `own/`.
        arguments: The constructor's keyword arguments.
        size: (H, W) in pixels that pictures are squashed to; None for the recipe that the library publishes, and for a
            network of any size.
        channels: Number of channels, C.
        mean: Subtracted per channel; for `torchvision` and `timm` without a size the library's.
        std: Divided by after that.
        scores: `softmax`, `sigmoid`, `value` or `none`, as `--scores` takes it.
        outputs: Number of outputs, K; 0 without scores.
        is_probability: Whether the network returns probabilities instead of logits.
        output: The key or index that `--output` takes, if it returns several tensors.
        layouts: Pattern of places in the network → `channels last`, or `tokens, N before the patches`: which axis is
            which, as the authors wrote it. All other places have channels first.
        checkpoint: `plain` for a state dict, `lightning` for a checkpoint that holds one behind a prefix.
        layers: Layers as `--layers` takes them.
        refused: The archiver's message if it rejects the network rightly.
    """

    name: str
    family: str
    build: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    channels: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scores: str = "softmax"
    outputs: int = 1000
    is_probability: bool = False
    output: str | None = None
    layouts: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str = "plain"
    layers: str = "auto"
    refused: str = ""

    def command(self, weights: Path, store: Path) -> list[str]:
        """Return the archiver's arguments; `--classes` names `classes.txt` beside the weights."""
        kind, _, name = self.build.partition(":")
        if self.family == "own":
            place = f"{OWN / kind}.py" if (OWN / f"{kind}.py").exists() else kind
            options = ["--arch", f"{place}:{name}", "--size", "{}x{}".format(*self.size) if self.size else "any"]
            options += ["--channels", str(self.channels)]
        elif kind in ("torchvision", "timm"):
            options = [f"--{kind}", name]
            options += ["--size", "{}x{}".format(*self.size), "--preprocessing", "squash"] if self.size else []
        else:
            options = ["--arch", self.build, "--size", "{}x{}".format(*self.size or ())]
        if self.mean:
            options += ["--mean", ",".join(map(str, self.mean)), "--std", ",".join(map(str, self.std))]
        if self.outputs and self.family != "torchvision":  # timm knows no labels where it has no weights.
            options += ["--classes", str(weights.with_name("classes.txt"))]
        if self.arguments:
            options += ["--arguments", json.dumps(self.arguments)]
        if self.scores != "softmax":
            options += ["--scores", self.scores]
        if self.output is not None:
            options += ["--output", self.output]
        options += ["--state-dict", str(weights), "--layers", self.layers]
        return [*options, "--name", self.name, "--store", str(store)]


def _torchvision(name: str, **more: Any) -> Case:
    return Case(name, "torchvision", f"torchvision:{name}", **more)


def _segmentation(name: str, node: str, said: str = "") -> Case:
    arguments = {"weights": None, "weights_backbone": None, "num_classes": 21}
    more: dict[str, Any] = {"size": (224, 224), "scores": "none", "outputs": 0, **IMAGENET}
    more["layers"] = f"deep={node},mask=output:out{said}"  # Of pooled features it cannot be told.
    return Case(name, "torchvision", f"torchvision.models.segmentation:{name}", arguments, **more)


def _timm(name: str, **more: Any) -> Case:
    return Case(name, "timm", f"timm:{name}", **more)


def _own(name: str, build: str, *, size: tuple[int, int] | None = (64, 64), outputs: int = 10, **more: Any) -> Case:
    return Case(name, "own", build, size=size, outputs=outputs, **more)


# The constructors of these two draw their random weights with scipy, for half a minute. Their published weights expect
# pictures normalised to another scale than the preset's; torchvision sets transform_input where it loads them itself.
_INCEPTION = {"init_weights": False, "transform_input": True}
_SWIN = {"features.0.0": "channels first", "features.*": "channels last"}
_CONVNEXT = {"features.*.block.[1-5]": "channels last"}  # A convolution, and a perceptron for each position.
_EDGENEXT = {"stages.*.norm": "channels last", "stages.*.mlp*": "channels last"}
_TOKENS = {"*": "tokens, 1 before the patches"}

CASES = (
    _torchvision("alexnet"),
    _torchvision("vgg11_bn"),
    _torchvision("resnet18"),
    _torchvision("resnet50"),
    _torchvision("resnext50_32x4d"),
    _torchvision("wide_resnet50_2"),
    _torchvision("densenet121"),
    _torchvision("squeezenet1_1"),
    _torchvision("shufflenet_v2_x1_0"),
    _torchvision("mobilenet_v2"),
    _torchvision("mobilenet_v3_small"),
    _torchvision("mnasnet0_5"),
    _torchvision("efficientnet_b0"),
    _torchvision("efficientnet_v2_s"),
    _torchvision("regnet_y_400mf"),
    _torchvision("googlenet", arguments=_INCEPTION),
    _torchvision("inception_v3", arguments=_INCEPTION),
    _torchvision("convnext_tiny", layouts=_CONVNEXT),
    _torchvision("swin_t", layouts=_SWIN),
    _torchvision("swin_v2_t", layouts=_SWIN),
    _torchvision("maxvit_t"),
    _torchvision("vit_b_16", layouts={"encoder.*": _TOKENS["*"]}),
    _segmentation("fcn_resnet50", "backbone.layer4.2.add"),
    _segmentation("deeplabv3_mobilenet_v3_large", "backbone.4.block.3", "@channels_first"),
    _segmentation("lraspp_mobilenet_v3_large", "backbone.4.block.3", "@channels_first"),
    _timm("resnet10t"),
    _timm("vit_tiny_patch16_224", layouts={"blocks.*": _TOKENS["*"], "norm": _TOKENS["*"]}),
    _timm("convnext_atto"),
    _timm("efficientformer_l1", layouts={"stages.3.blocks.[4-9]*": "tokens, 0 before the patches"}),
    _timm("mobilenetv4_conv_small"),
    _timm("ghostnet_050"),
    _timm("repvgg_a0"),
    _timm("edgenext_xx_small", layouts=_EDGENEXT),
    _timm("levit_128s", layouts={"stages.*": "tokens, 0 before the patches"}),
    _timm("mixer_s32_224", layouts={"blocks.*": "tokens, 0 before the patches"}),
    _timm("poolformer_s12"),
    _timm("lcnet_050"),
    _timm("mobilevit_xxs"),
    _timm("starnet_s1"),
    _timm("nfnet_l0"),
    _timm("tf_efficientnet_lite0"),
    _own("unet", "pictures_out:UNet", scores="none", outputs=0, layers="bottom=bottom.5,up=up1.5,mask=head"),
    _own("autoencoder", "pictures_out:Autoencoder", scores="none", outputs=0),
    _own("siamese", "pictures_out:Siamese", scores="none", outputs=0, refused="the service gives it one picture"),
    _own("siamese_branch", "pictures_out:Branch", scores="none", outputs=0),
    _own("multi_label", "scores_out:Net", scores="sigmoid", outputs=5, arguments={"outputs": 5}),
    _own("binary", "scores_out:Net", scores="sigmoid", outputs=1, arguments={"outputs": 1}),
    _own("regression", "scores_out:Net", scores="value", outputs=2, arguments={"outputs": 2}),
    _own("one_value", "scores_out:Squeezed", scores="value", outputs=1),
    _own("dict_output", "scores_out:Named", output="logits", layers="conv=features.8,embedding=output:embedding"),
    _own("tuple_output", "scores_out:Numbered", output="0"),
    _own("probabilities", "scores_out:Probabilities", scores="sigmoid", is_probability=True),
    _own("unnamed_probabilities", "scores_out:Probabilities", refused="between 0 and 1"),
    _own("five_channels", "scores_out:Net", channels=5, arguments={"channels": 5}),
    _own("grey", "scores_out:Net", channels=1, arguments={"channels": 1}, mean=(0.45,), std=(0.22,)),
    _own("any_size", "scores_out:Net", size=None),
    _own("lightning", "scores_out:Net", checkpoint="lightning", **IMAGENET),
    _own("folder", "folder_net.net:Net", **IMAGENET),
)
