"""Variants: shippable files made of the float32 one, each with the most that it may differ from the tuned run."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir
import torch
from onnx import ModelProto

from ..errors import SubspanError, reason
from ..trace import muted
from .half import halve
from .onnx import LIMIT, data_of, locate, save, size_of

TARGETS = ("cpu", "cuda")
PLAIN = "float32"
ATTENTIONS = ("Attention", "MultiHeadAttention", "GroupQueryAttention")
_BLOCK = 32
_INT8 = 4  # ONNX Runtime's level of accuracy that computes in int8.


@dataclass(frozen=True)
class Variant:
    """One way to write a model as a file.

    Attributes:
        file: its name, as consumers look for it.
        make: writes it: (the float32 file, the file to write); None: it is that file.
        targets: what it makes sense on.
        agreement: least share of decisions that are the tuned run's.
        change: most that a metric without decisions may differ by, relative; None: no more than float32 rounds.
        fuses: whether its attentions have to be one node each.
        mixes: whether what it makes of a row depends on the others in the batch.
        dtype: that it computes in, where PyTorch has the same.
    """

    file: str
    make: Callable[[Path, Path], None] | None
    targets: tuple[str, ...]
    agreement: float
    change: float | None
    fuses: bool = False
    mixes: bool = False
    dtype: torch.dtype = torch.float32


def fused(source: Path, file: Path) -> None:
    """ONNX Runtime's own attention, normalisation and GELU nodes, by onnxscript's rules."""
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model, _ = optimize_for_ort(onnx_ir.load(source))
    save(model, file)


def int8(source: Path, file: Path) -> None:
    """Weights in int8, asymmetric in blocks of 32 inputs; activations in int8 by row and block, as they come."""
    _save(_blocks(_bare(source), 8), file)


def int8_fused(source: Path, file: Path) -> None:
    """Weights in int8 as of `int8`, in the products that `fused` leaves."""
    fused(source, file)
    model = _bare(file)
    data_of(file).unlink(missing_ok=True)  # It would be appended to.
    _save(_blocks(model, 8), file)


def int8_dynamic(source: Path, file: Path) -> None:
    """Weights in int8, symmetric per output; activations in uint8 by tensor, as they come; tables of ids too."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        _bare(source),
        file,
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=size_of(source) > LIMIT,
        extra_options={"WeightSymmetric": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    if (data := file.with_name(f"{file.name}.data")).exists():  # Its own name for them.
        locate(file, file)
        data.rename(data_of(file))


def int4(source: Path, file: Path) -> None:
    """Weights in int4, asymmetric in blocks of 32 inputs; those that make an output of the model in int8."""
    model = _bare(source)
    heads = _heads(model)
    model = _blocks(model, 4, nodes_to_exclude=heads)
    _save(_blocks(model, 8, nodes_to_include=heads) if heads else model, file)


def _blocks(model: ModelProto, bits: int, **which: list[str]) -> ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(model, bits, _BLOCK, accuracy_level=_INT8, **which)
    made.process()
    return made.model.model


def float16(source: Path, file: Path) -> None:
    """Half precision; softmax, statistics, inputs and outputs in float32."""
    halve(source, file, onnx_ir.DataType.FLOAT16)


def bfloat16(source: Path, file: Path) -> None:
    """The wide range of float32 and eight bits of fraction; softmax, statistics, inputs and outputs in float32."""
    halve(source, file, onnx_ir.DataType.BFLOAT16)


def float16_fused(source: Path, file: Path) -> None:
    """Half precision of the nodes that `fused` makes, whose softmax and statistics are in float32 inside."""
    fused(source, file)
    halve(file, file, onnx_ir.DataType.FLOAT16)


VARIANTS = {
    PLAIN: Variant("model_fp32.onnx", None, TARGETS, 0.99, None),
    "float32-fused": Variant("model_fused.onnx", fused, TARGETS, 0.999, None, fuses=True),
    "float16": Variant("model_fp16.onnx", float16, ("cuda",), 0.999, 0.01, dtype=torch.float16),
    "float16-fused": Variant(
        "model_fp16_fused.onnx", float16_fused, ("cuda",), 0.999, 0.01, fuses=True, dtype=torch.float16
    ),
    "bfloat16": Variant("model_bf16.onnx", bfloat16, ("cuda",), 0.99, 0.03, dtype=torch.bfloat16),
    "int8": Variant("model_int8.onnx", int8, ("cpu",), 0.995, 0.03),
    "int8-fused": Variant("model_int8_fused.onnx", int8_fused, ("cpu",), 0.995, 0.03, fuses=True),
    "int8-dynamic": Variant("model_quantized.onnx", int8_dynamic, ("cpu",), 0.995, 0.03, mixes=True),
    "int4": Variant("model_q4.onnx", int4, TARGETS, 0.98, 0.03),
}


def build(name: str, source: Path) -> Path:
    """Write a variant of the float32 file beside it.

    Raises:
        SubspanError: it can't be made of this model.
        OSError: no space, no permission.
    """
    one, file = VARIANTS[name], source.with_name(VARIANTS[name].file)
    if one.make is None:
        return source
    try:
        with muted():
            one.make(source, file)
    except OSError:
        raise
    except Exception as error:  # Of several libraries.
        raise SubspanError(f"can't be made: {reason(error)}") from error
    return file


def attention_nodes(file: Path) -> int:
    """How many attentions of a file are one node."""
    nodes = onnx.load(file, load_external_data=False).graph.node
    return sum(node.op_type in ATTENTIONS for node in nodes)


def _bare(source: Path) -> ModelProto:
    """The model without shapes of values inside, which quantisation takes for those of what it writes."""
    model = onnx.load(source)
    del model.graph.value_info[:]
    return model


def _heads(model: ModelProto) -> list[str]:
    """Names of the products that an output of the model is made of alone: by views and sums."""
    makers = {value: node for node in model.graph.node for value in node.output}
    found = []
    for output in model.graph.output:
        node = makers.get(output.name)
        while node is not None and node.op_type in ("Add", "Cast", "Identity", "Reshape"):
            node = makers.get(node.input[0])
        if node is not None and node.op_type == "MatMul":
            found.append(node.name)
    return found


def _save(model: ModelProto, file: Path) -> None:
    large = sum(len(one.raw_data) for one in model.graph.initializer) > LIMIT
    onnx.save(model, file, save_as_external_data=large, location=data_of(file).name)


def wanted(names: Collection[str] | None, target: str, measured: bool) -> list[str]:
    """The variants to build: those that are named, else what makes sense on the target; the safe one where nothing is
    measured."""
    if names is not None:
        return list(names)
    return [name for name, one in VARIANTS.items() if target in one.targets] if measured else [PLAIN]
