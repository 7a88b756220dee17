"""A model for other programs, as ONNX or as a program of ``torch.export``, compared with the model itself before it is
kept."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_core.atomic import atomic_path
from mae_core.errors import UserError

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""The largest difference of an output, as a share of the largest output above 1, that an export may show."""
HALVED_FROM = 1024
"""Numbers of a tensor from which on ``half`` stores it in 16 bits: biases and norms stay as they are."""
FORMATS = {".onnx": "ONNX", ".pt2": "torch.export"}
FACTS = "facts.json"
"""The extra file of a ``.pt2`` that holds the facts."""


def check_out(out: Path, *suffixes: str) -> None:
    """Raise ``UserError`` where ``out`` ends in none of ``suffixes`` or exists, and as ``require_onnx`` does."""
    if out.suffix not in suffixes:
        named = (f"{suffix} ({FORMATS[suffix]})" if len(suffixes) > 1 else suffix for suffix in suffixes)
        raise UserError(f"--out {out} has to end in {' or '.join(named)}")
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")
    if out.suffix == ".onnx":
        require_onnx()


def require_onnx() -> None:
    """Raise ``UserError``, with the line that installs them, where packages of the ONNX export are missing."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}; install them with pip install 'mae-transfer[onnx]'")


def export_model(
    model: nn.Module,
    example: Tensor,
    path: Path,
    outputs: Sequence[str],
    facts: Mapping[str, Any],
    *,
    half: bool = False,
    any_batch: bool = True,
) -> float:
    """Write ``model`` as the ending of ``path`` says -> the largest difference of its first output, as written, from
    its own.

    example    (B, C, H, W): the images that the file will take, of any number with ``any_batch``
    outputs    names of what ``model`` returns: a tensor or a tuple of them
    facts      metadata of an ONNX file, ``facts.json`` of a ``.pt2``; JSON values
    half       store weights in 16 bits: half the file; the computation stays in 32. ``model`` is rounded alike

    Raises ``UserError`` as ``check_out`` does, and where the difference is too large: then nothing is written.
    """
    check_out(path, *FORMATS)
    if half:
        round_weights(model)
    images = torch.cat([example, example.flip(0) * 0.5, example[:1] * 2]) if any_batch else example.flip(-1) * 0.5
    with atomic_path(path) as temporary, torch.no_grad():
        if path.suffix == ".onnx":
            _write_onnx(model, example, temporary, outputs, facts, half, any_batch)
            found = run_onnx(temporary, outputs[0], images)
        else:
            program = torch.export.export(model, (example,), dynamic_shapes=_shapes(any_batch))
            if half:
                _store_program_in_16_bits(program)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.export.save(program, temporary, extra_files={FACTS: json.dumps(dict(facts))})
                found = _first(torch.export.load(temporary).module()(images))
        expected = _first(model(images))
        difference = float((found - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise UserError(
                f"the exported model differs from torch's by {difference:.1e}, more than {TOLERANCE:g} of its largest "
                "output, so nothing was written"
            )
    return difference


def _first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def _shapes(any_batch: bool) -> tuple[dict[int, Any]] | None:
    """What may change of the one input."""
    return ({0: torch.export.Dim("batch", min=1)},) if any_batch else None


def _write_onnx(
    model: nn.Module,
    example: Tensor,
    path: Path,
    outputs: Sequence[str],
    facts: Mapping[str, Any],
    half: bool,
    any_batch: bool,
) -> None:
    names: dict[str, Any] = {"input_names": ["images"], "output_names": list(outputs)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = _shapes(any_batch)
        program = torch.onnx.export(model, (example,), dynamo=True, verbose=False, dynamic_shapes=shapes, **names)
    assert program is not None
    save_onnx(program.model_proto, path, facts, half)


def save_onnx(proto: Any, path: Path, facts: Mapping[str, Any], half: bool) -> None:
    """Write a graph with its metadata; ``half``: its weights in 16 bits."""
    import onnx

    onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in facts.items()})
    if half:
        _store_in_16_bits(proto)
    onnx.save(proto, str(path))


def run_onnx(path: Path, output: str, images: Tensor) -> Tensor:
    """One output of an ONNX file on images (B, C, H, W), by onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([output], {"images": images.numpy()})[0])


@torch.no_grad()
def round_weights(network: nn.Module) -> None:
    """Round what ``half`` stores in 16 bits, so that the parity is that of the same weights."""
    for tensor in network.parameters():
        if tensor.numel() >= HALVED_FROM:
            tensor.copy_(tensor.half())


def _store_in_16_bits(proto: Any) -> None:
    """Keep the large float32 tensors of a graph in 16 bits, each behind a cast back, which a runtime does once."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.FLOAT and values.size >= HALVED_FROM:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(values.astype("float16"), f"{name}_16"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _store_program_in_16_bits(program: torch.export.ExportedProgram) -> None:
    """As ``_store_in_16_bits``, of a program of ``torch.export``."""
    graph = program.graph_module.graph
    parameters = program.graph_signature.inputs_to_parameters
    body = next(node for node in graph.nodes if node.op != "placeholder")
    for node in [node for node in graph.nodes if node.name in parameters]:
        values = program.state_dict[parameters[node.name]]
        if values.numel() < HALVED_FROM or values.dtype != torch.float32:
            continue
        with graph.inserting_before(body):
            cast = graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": torch.float32})
        cast.meta = dict(node.meta)
        node.meta["val"] = node.meta["val"].half()
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
        program.state_dict[parameters[node.name]] = nn.Parameter(values.half(), requires_grad=False)
    program.graph_module.recompile()
