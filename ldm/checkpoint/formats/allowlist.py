"""The names that a pickled checkpoint may mention, and what they stand for."""

from __future__ import annotations

CALLBACKS = ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping", "lr_monitor.LearningRateMonitor")
NODES = ("Any", "Boolean", "Float", "Integer", "String", "Value")
NUMPY_KINDS = ("Bool", "Int32", "Int64", "UInt8", "UInt32", "UInt64", "Float16", "Float32", "Float64")
DTYPES = (
    *("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
    *("float8_e5m2fnuz", "complex32", "complex64", "complex128", "bool"),
    *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
)
# Storage classes and the dtype of their elements.
STORAGES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}
STORAGE_NAMES = {
    **{f"torch.{kind}Storage": dtype for kind, dtype in STORAGES.items()},
    **{f"torch.cuda.{kind}Storage": dtype for kind, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": "uint8",
}
TENSOR_NAMES = frozenset(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3"))
PARAMETER_NAMES = frozenset(
    ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state", "torch.nn.parameter.Parameter")
)
SUBCLASS_NAME = "torch._tensor._rebuild_from_type_v2"
# Functions that build tensors other than plain arrays, and what these are.
OTHER_TENSORS = {
    "torch._utils._rebuild_meta_tensor_no_storage": "empty (meta)",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_wrapper_subclass": "of a tensor subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "of another device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "of another device",
}
DICT_NAMES = frozenset(
    (
        "collections.OrderedDict",
        "collections.Counter",
        "collections.defaultdict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "lightning.fabric.utilities.data.AttributeDict",
    )
)
# Other names of real files. Their values are ignored.
INERT_NAMES = frozenset(
    (
        *(f"pytorch_lightning.callbacks.{name}" for name in CALLBACKS),
        *(f"lightning.pytorch.callbacks.{name}" for name in CALLBACKS),
        # the best score of ModelCheckpoint, learning rates, random states
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        "numpy.ndarray",
        "numpy.dtype",
        *(f"numpy.dtypes.{name}DType" for name in NUMPY_KINDS),
        # hyper_parameters saved as omegaconf containers
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        *(f"omegaconf.base.{name}" for name in ("Metadata", "ContainerMetadata", "Node")),
        *(f"omegaconf.nodes.{name}Node" for name in NODES),
        "omegaconf.nodes.ValueNode",
        *(f"typing.{name}" for name in ("Any", "Dict", "List")),
        *(f"builtins.{name}" for name in ("bool", "bytearray", "complex", "dict", "float", "int", "list", "object")),
        *(f"builtins.{name}" for name in ("set", "str", "tuple")),
        "_codecs.encode",  # bytes, in protocol 2
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        # textual inversion embeddings, which are then recognised
        "torch.nn.modules.container.ParameterDict",
        *(f"torch.{name}" for name in ("Tensor", "Size", "device", "strided", "sparse_coo", "sparse_csr")),
        *(f"torch.{kind}Tensor" for kind in STORAGES),
        *(f"torch.cuda.{kind}Tensor" for kind in STORAGES),
        *(f"torch.per_{kind}_affine" for kind in ("tensor", "channel")),
        *(f"torch.{name}" for name in DTYPES),
        *(f"torch.Q{name}Storage" for name in ("Int8", "UInt8", "Int32")),
        "torch.serialization._get_layout",
    )
)
KNOWN_NAMES = (
    TENSOR_NAMES | PARAMETER_NAMES | DICT_NAMES | INERT_NAMES | STORAGE_NAMES.keys() | OTHER_TENSORS.keys()
) | {SUBCLASS_NAME}
