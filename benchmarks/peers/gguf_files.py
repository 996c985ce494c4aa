"""The embedded model as llama.cpp reads it: its published GGUF file (Q4_1) with the weights in another type.

fp32 is what the Q4_1 weights stand for, so that llama.cpp computes with the numbers that everybody else computes with.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import gguf

from fairserve.engine.embedded import extract_gguf

WRITTEN_ANYWAY = (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE)


def gguf_file(model: str, kind: str, folder: Path) -> Path:
    """``f32.gguf`` or ``q8_0.gguf`` of an embedded model, made when it is not there.

    Raises:
        ModelError: no such model, or it cannot be fetched.
    """
    made = folder / f"{model}.{kind}"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch_name:
            scratch = Path(scratch_name)
            kinds = {"f32.gguf": gguf.GGMLQuantizationType.F32, "q8_0.gguf": gguf.GGMLQuantizationType.Q8_0}
            convert(extract_gguf(model, scratch), scratch / made.name, kinds[kind])
            (scratch / made.name).replace(made)
    return made


def convert(source: Path, target: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Copy a GGUF file with every matrix written as ``kind``; vectors stay float32."""
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    assert architecture is not None
    writer = gguf.GGUFWriter(target, architecture.contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in WRITTEN_ANYWAY:
            continue
        is_list = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if is_list else None)
    is_f32 = kind == gguf.GGMLQuantizationType.F32
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if is_f32 else gguf.LlamaFileType.MOSTLY_Q8_0)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if is_f32 or values.ndim < 2:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
