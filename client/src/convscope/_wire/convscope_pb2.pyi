from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    FLOAT32: _ClassVar[Dtype]
    FLOAT16: _ClassVar[Dtype]
    UINT8: _ClassVar[Dtype]
DTYPE_UNSPECIFIED: Dtype
FLOAT32: Dtype
FLOAT16: Dtype
UINT8: Dtype

class ChannelSelection(_message.Message):
    __slots__ = ("indexes", "strongest")
    INDEXES_FIELD_NUMBER: _ClassVar[int]
    STRONGEST_FIELD_NUMBER: _ClassVar[int]
    indexes: _containers.RepeatedScalarFieldContainer[int]
    strongest: int
    def __init__(self, indexes: _Optional[_Iterable[int]] = ..., strongest: _Optional[int] = ...) -> None: ...

class PredictRequest(_message.Message):
    __slots__ = ("pictures", "layers", "top_k", "map_dtype", "pool", "channels", "describe", "request_id", "timing", "explain", "filters", "traceparent", "tracestate", "edits", "compare")
    PICTURES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAP_DTYPE_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    DESCRIBE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    COMPARE_FIELD_NUMBER: _ClassVar[int]
    pictures: _containers.RepeatedScalarFieldContainer[bytes]
    layers: _containers.RepeatedScalarFieldContainer[str]
    top_k: int
    map_dtype: Dtype
    pool: int
    channels: ChannelSelection
    describe: bool
    request_id: str
    timing: bool
    explain: Explain
    filters: str
    traceparent: str
    tracestate: str
    edits: _containers.RepeatedCompositeFieldContainer[Edit]
    compare: bool
    def __init__(self, pictures: _Optional[_Iterable[bytes]] = ..., layers: _Optional[_Iterable[str]] = ..., top_k: _Optional[int] = ..., map_dtype: _Optional[_Union[Dtype, str]] = ..., pool: _Optional[int] = ..., channels: _Optional[_Union[ChannelSelection, _Mapping]] = ..., describe: bool = ..., request_id: _Optional[str] = ..., timing: bool = ..., explain: _Optional[_Union[Explain, _Mapping]] = ..., filters: _Optional[str] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ..., edits: _Optional[_Iterable[_Union[Edit, _Mapping]]] = ..., compare: bool = ...) -> None: ...

class Edit(_message.Message):
    __slots__ = ("layer", "operation", "value", "channels", "excluded", "region", "box", "picture")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    layer: str
    operation: str
    value: _containers.RepeatedScalarFieldContainer[float]
    channels: _containers.RepeatedScalarFieldContainer[int]
    excluded: _containers.RepeatedScalarFieldContainer[int]
    region: _containers.RepeatedScalarFieldContainer[int]
    box: _containers.RepeatedScalarFieldContainer[float]
    picture: int
    def __init__(self, layer: _Optional[str] = ..., operation: _Optional[str] = ..., value: _Optional[_Iterable[float]] = ..., channels: _Optional[_Iterable[int]] = ..., excluded: _Optional[_Iterable[int]] = ..., region: _Optional[_Iterable[int]] = ..., box: _Optional[_Iterable[float]] = ..., picture: _Optional[int] = ...) -> None: ...

class Explain(_message.Message):
    __slots__ = ("method", "layer", "target", "window", "step", "steps", "view", "picture")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    method: str
    layer: str
    target: int
    window: int
    step: int
    steps: int
    view: str
    picture: bool
    def __init__(self, method: _Optional[str] = ..., layer: _Optional[str] = ..., target: _Optional[int] = ..., window: _Optional[int] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., view: _Optional[str] = ..., picture: bool = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data", "scale", "offset")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    dtype: Dtype
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    scale: _containers.RepeatedScalarFieldContainer[float]
    offset: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, dtype: _Optional[_Union[Dtype, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., scale: _Optional[_Iterable[float]] = ..., offset: _Optional[_Iterable[float]] = ...) -> None: ...

class ClassScore(_message.Message):
    __slots__ = ("index", "label", "probability", "logit", "value")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    index: int
    label: str
    probability: float
    logit: float
    value: float
    def __init__(self, index: _Optional[int] = ..., label: _Optional[str] = ..., probability: _Optional[float] = ..., logit: _Optional[float] = ..., value: _Optional[float] = ...) -> None: ...

class FeatureMap(_message.Message):
    __slots__ = ("layer", "tensor", "channels")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    layer: str
    tensor: Tensor
    channels: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[str] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., channels: _Optional[_Iterable[int]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("top", "maps", "error", "explanation", "change", "notes")
    TOP_FIELD_NUMBER: _ClassVar[int]
    MAPS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    top: _containers.RepeatedCompositeFieldContainer[ClassScore]
    maps: _containers.RepeatedCompositeFieldContainer[FeatureMap]
    error: Error
    explanation: Explanation
    change: Change
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, top: _Optional[_Iterable[_Union[ClassScore, _Mapping]]] = ..., maps: _Optional[_Iterable[_Union[FeatureMap, _Mapping]]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., explanation: _Optional[_Union[Explanation, _Mapping]] = ..., change: _Optional[_Union[Change, _Mapping]] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class Change(_message.Message):
    __slots__ = ("top", "maps")
    TOP_FIELD_NUMBER: _ClassVar[int]
    MAPS_FIELD_NUMBER: _ClassVar[int]
    top: _containers.RepeatedCompositeFieldContainer[ClassScore]
    maps: _containers.RepeatedCompositeFieldContainer[FeatureMap]
    def __init__(self, top: _Optional[_Iterable[_Union[ClassScore, _Mapping]]] = ..., maps: _Optional[_Iterable[_Union[FeatureMap, _Mapping]]] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("method", "layer", "target", "label", "heat", "delta", "picture", "original_size", "region")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    HEAT_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_SIZE_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    method: str
    layer: str
    target: int
    label: str
    heat: Tensor
    delta: float
    picture: Tensor
    original_size: _containers.RepeatedScalarFieldContainer[int]
    region: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, method: _Optional[str] = ..., layer: _Optional[str] = ..., target: _Optional[int] = ..., label: _Optional[str] = ..., heat: _Optional[_Union[Tensor, _Mapping]] = ..., delta: _Optional[float] = ..., picture: _Optional[_Union[Tensor, _Mapping]] = ..., original_size: _Optional[_Iterable[int]] = ..., region: _Optional[_Iterable[float]] = ...) -> None: ...

class PredictReply(_message.Message):
    __slots__ = ("model", "version", "engine", "device", "results", "error", "card", "request_id", "timing", "filters", "scores", "edits")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    engine: str
    device: str
    results: _containers.RepeatedCompositeFieldContainer[Result]
    error: Error
    card: ModelCard
    request_id: str
    timing: Timing
    filters: Tensor
    scores: str
    edits: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., engine: _Optional[str] = ..., device: _Optional[str] = ..., results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., card: _Optional[_Union[ModelCard, _Mapping]] = ..., request_id: _Optional[str] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., filters: _Optional[_Union[Tensor, _Mapping]] = ..., scores: _Optional[str] = ..., edits: _Optional[int] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("read_s", "decode_s", "preprocess_s", "forward_s", "encode_s", "handler_s", "batch_requests")
    READ_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_S_FIELD_NUMBER: _ClassVar[int]
    FORWARD_S_FIELD_NUMBER: _ClassVar[int]
    ENCODE_S_FIELD_NUMBER: _ClassVar[int]
    HANDLER_S_FIELD_NUMBER: _ClassVar[int]
    BATCH_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    read_s: float
    decode_s: float
    preprocess_s: float
    forward_s: float
    encode_s: float
    handler_s: float
    batch_requests: int
    def __init__(self, read_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., preprocess_s: _Optional[float] = ..., forward_s: _Optional[float] = ..., encode_s: _Optional[float] = ..., handler_s: _Optional[float] = ..., batch_requests: _Optional[int] = ...) -> None: ...

class ModelCard(_message.Message):
    __slots__ = ("model", "version", "description", "architecture", "engine", "device", "classes", "input", "layers", "parameters", "training", "limits", "multiply_adds", "explanations", "scores", "sources", "edits")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    MULTIPLY_ADDS_FIELD_NUMBER: _ClassVar[int]
    EXPLANATIONS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    description: str
    architecture: str
    engine: str
    device: str
    classes: _containers.RepeatedScalarFieldContainer[str]
    input: Input
    layers: _containers.RepeatedCompositeFieldContainer[Layer]
    parameters: int
    training: Training
    limits: Limits
    multiply_adds: int
    explanations: _containers.RepeatedScalarFieldContainer[str]
    scores: str
    sources: _containers.RepeatedCompositeFieldContainer[Source]
    edits: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., description: _Optional[str] = ..., architecture: _Optional[str] = ..., engine: _Optional[str] = ..., device: _Optional[str] = ..., classes: _Optional[_Iterable[str]] = ..., input: _Optional[_Union[Input, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[Layer, _Mapping]]] = ..., parameters: _Optional[int] = ..., training: _Optional[_Union[Training, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., multiply_adds: _Optional[int] = ..., explanations: _Optional[_Iterable[str]] = ..., scores: _Optional[str] = ..., sources: _Optional[_Iterable[_Union[Source, _Mapping]]] = ..., edits: _Optional[_Iterable[str]] = ...) -> None: ...

class Input(_message.Message):
    __slots__ = ("channels", "height", "width", "mean", "std", "resize", "interpolation", "antialias", "bgr", "fit", "fill")
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    RESIZE_FIELD_NUMBER: _ClassVar[int]
    INTERPOLATION_FIELD_NUMBER: _ClassVar[int]
    ANTIALIAS_FIELD_NUMBER: _ClassVar[int]
    BGR_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    FILL_FIELD_NUMBER: _ClassVar[int]
    channels: int
    height: int
    width: int
    mean: _containers.RepeatedScalarFieldContainer[float]
    std: _containers.RepeatedScalarFieldContainer[float]
    resize: _containers.RepeatedScalarFieldContainer[int]
    interpolation: str
    antialias: bool
    bgr: bool
    fit: str
    fill: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, channels: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., mean: _Optional[_Iterable[float]] = ..., std: _Optional[_Iterable[float]] = ..., resize: _Optional[_Iterable[int]] = ..., interpolation: _Optional[str] = ..., antialias: bool = ..., bgr: bool = ..., fit: _Optional[str] = ..., fill: _Optional[_Iterable[int]] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("name", "module", "shape", "stride", "receptive_field", "receptive_field_start", "parameters", "bytes", "input_shape", "operation", "kernel", "step", "padding", "dilation", "groups", "multiply_adds", "dense_parameters", "layout", "sources")
    class BytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODULE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    RECEPTIVE_FIELD_FIELD_NUMBER: _ClassVar[int]
    RECEPTIVE_FIELD_START_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    INPUT_SHAPE_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    DILATION_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    MULTIPLY_ADDS_FIELD_NUMBER: _ClassVar[int]
    DENSE_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    name: str
    module: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    stride: _containers.RepeatedScalarFieldContainer[int]
    receptive_field: _containers.RepeatedScalarFieldContainer[int]
    receptive_field_start: _containers.RepeatedScalarFieldContainer[int]
    parameters: int
    bytes: _containers.ScalarMap[str, int]
    input_shape: _containers.RepeatedScalarFieldContainer[int]
    operation: str
    kernel: _containers.RepeatedScalarFieldContainer[int]
    step: _containers.RepeatedScalarFieldContainer[int]
    padding: _containers.RepeatedScalarFieldContainer[int]
    dilation: _containers.RepeatedScalarFieldContainer[int]
    groups: int
    multiply_adds: int
    dense_parameters: int
    layout: str
    sources: _containers.RepeatedCompositeFieldContainer[Source]
    def __init__(self, name: _Optional[str] = ..., module: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., stride: _Optional[_Iterable[int]] = ..., receptive_field: _Optional[_Iterable[int]] = ..., receptive_field_start: _Optional[_Iterable[int]] = ..., parameters: _Optional[int] = ..., bytes: _Optional[_Mapping[str, int]] = ..., input_shape: _Optional[_Iterable[int]] = ..., operation: _Optional[str] = ..., kernel: _Optional[_Iterable[int]] = ..., step: _Optional[_Iterable[int]] = ..., padding: _Optional[_Iterable[int]] = ..., dilation: _Optional[_Iterable[int]] = ..., groups: _Optional[int] = ..., multiply_adds: _Optional[int] = ..., dense_parameters: _Optional[int] = ..., layout: _Optional[str] = ..., sources: _Optional[_Iterable[_Union[Source, _Mapping]]] = ...) -> None: ...

class Source(_message.Message):
    __slots__ = ("layer", "fewest", "most")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FEWEST_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    layer: str
    fewest: int
    most: int
    def __init__(self, layer: _Optional[str] = ..., fewest: _Optional[int] = ..., most: _Optional[int] = ...) -> None: ...

class Training(_message.Message):
    __slots__ = ("data", "train_pictures", "test_pictures", "epochs", "train_accuracy", "test_accuracy", "seconds", "machine", "versions")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DATA_FIELD_NUMBER: _ClassVar[int]
    TRAIN_PICTURES_FIELD_NUMBER: _ClassVar[int]
    TEST_PICTURES_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    TEST_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    data: str
    train_pictures: int
    test_pictures: int
    epochs: int
    train_accuracy: float
    test_accuracy: float
    seconds: float
    machine: str
    versions: _containers.ScalarMap[str, str]
    def __init__(self, data: _Optional[str] = ..., train_pictures: _Optional[int] = ..., test_pictures: _Optional[int] = ..., epochs: _Optional[int] = ..., train_accuracy: _Optional[float] = ..., test_accuracy: _Optional[float] = ..., seconds: _Optional[float] = ..., machine: _Optional[str] = ..., versions: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_images", "max_image_bytes", "max_image_pixels", "max_reply_bytes")
    MAX_IMAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_images: int
    max_image_bytes: int
    max_image_pixels: int
    max_reply_bytes: int
    def __init__(self, max_images: _Optional[int] = ..., max_image_bytes: _Optional[int] = ..., max_image_pixels: _Optional[int] = ..., max_reply_bytes: _Optional[int] = ...) -> None: ...
