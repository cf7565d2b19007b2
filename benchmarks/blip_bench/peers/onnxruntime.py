"""ONNX Runtime's CPU provider: float32, and 8 bits by its dynamic quantisation. It has no bfloat16 on x86.

Its own optimiser fuses the encoder's attention and norms before ONNX Runtime loads the graph. IO binding
keeps the keys and values of images and texts in its memory between steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort  # pyright: ignore[reportMissingImports]
import torch
from blip_kernels.cpu.processor import has_int8
from onnxruntime.quantization import QuantType, quantize_dynamic  # pyright: ignore[reportMissingImports]
from onnxruntime.transformers.optimizer import optimize_model  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.export import Dim

from blip_bench.peers.modules import INPUTS, Cut, Decoder, Peer, Step, empty_past, step_inputs

DTYPES = ("float32", "int8")
OPSET = 20


def peers(parts: Cut, pixels: Tensor, dtypes: Sequence[str]) -> Iterator[tuple[str, Peer]]:
    """A peer for each dtype that is supported. `pixels` [images, 3, size, size] are an example input. The
    graphs, a few times as large as the weights, are in a temporary directory until all are loaded."""
    if not set(dtypes) & set(DTYPES):
        return
    with TemporaryDirectory() as directory:
        graphs = export(parts, pixels[:1].repeat(2, 1, 1, 1), Path(directory))
        for dtype in dtypes:
            if dtype in DTYPES:
                vision, *text = (_session(quantised(graph) if dtype == "int8" else graph) for graph in graphs)
                begin = partial(_begin, *text, parts.decoder) if text else None
                yield f"onnxruntime {dtype}", Peer(partial(_encode, vision), begin)


def export(parts: Cut, pixels: Tensor, directory: Path) -> list[Path]:
    """Export graphs for any number of images and rows: the encoder and, with captions, the projection of
    images' keys and values, and the decoder."""
    save = partial(torch.onnx.export, dynamo=True, opset_version=OPSET, verbose=False)
    vision, image_kv, decoder = (directory / f"{name}.onnx" for name in ("vision", "image_kv", "decoder"))
    batch = {0: Dim("images")}
    with torch.no_grad():
        save(parts.vision, (pixels,), vision, input_names=["pixels"], dynamic_shapes=(batch,))
        fused = _fuse(vision, parts)
        if parts.image_kv is None or parts.decoder is None:
            return [fused]
        embeds = parts.vision(pixels)
        of_images = parts.image_kv(embeds)
        numbers = range(len(of_images))
        save(parts.image_kv, (embeds,), image_kv, input_names=["embeds"], dynamic_shapes=(batch,),
             output_names=[f"image {i}" for i in numbers])
        rows, steps, before = 3 * len(pixels), 3, 5
        past = empty_past(parts.decoder, rows, places=before)
        ids, order = torch.zeros(rows, steps, dtype=torch.long), torch.arange(rows)
        save(parts.decoder, (*step_inputs(ids, before, order), *past, *of_images),
             decoder,
             input_names=[*INPUTS, *(f"past {i}" for i in numbers), *(f"image {i}" for i in numbers)],
             output_names=["logits", *(f"present {i}" for i in numbers)], dynamic_shapes=_free(len(past)))
    return [fused, image_kv, decoder]


def _free(layers: int) -> tuple[Any, ...]:
    """The dimensions of the decoder's inputs that vary. The exporter infers their relations itself, since it
    cannot prove that rows are images × beams."""
    vary = Dim.AUTO
    past, of_images = {0: vary, 2: vary}, {0: vary}
    kv = (*[past] * layers, *[of_images] * layers)
    return {0: vary, 1: vary}, {1: vary}, {2: vary, 3: vary}, {0: vary}, kv


def _fuse(path: Path, parts: Cut) -> Path:
    """Fuse attention, norms and activations of the encoder's graph into single operators."""
    attention = parts.vision.vision.encoder.layers[0].self_attn
    graph = optimize_model(str(path), model_type="vit", num_heads=attention.num_heads,
                           hidden_size=attention.embed_dim, opt_level=0, use_gpu=False)
    fused = path.with_suffix(".fused.onnx")
    graph.save_model_to_file(str(fused), use_external_data_format=True)
    return fused


def quantised(path: Path) -> Path:
    """The graph with 8-bit weights and dynamically quantised activations. Without VNNI the sum of two 8-bit
    products overflows its 16 bits, so weights have 7 bits there."""
    target = path.with_suffix(".int8.onnx")
    quantize_dynamic(path, target, per_channel=True, reduce_range=not has_int8(), weight_type=QuantType.QInt8,
                     use_external_data_format=True, op_types_to_quantize=["MatMul", "Gemm"])
    return target


def _session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _encode(vision: Any, pixels: Tensor) -> Tensor:
    parts = [vision.run(None, {"pixels": picture[None]})[0] for picture in pixels.numpy()]
    return torch.from_numpy(np.concatenate(parts))


def _begin(image_kv: Any, session: Any, decoder: Decoder, embeds: Tensor) -> Step:
    value = ort.OrtValue.ortvalue_from_numpy
    of_images = [value(part) for part in image_kv.run(None, {"embeds": embeds.numpy()})]
    past = [value(part.numpy()) for part in empty_past(decoder, len(embeds))]

    def step(ids: Tensor, position: int, order: Tensor) -> Tensor:
        nonlocal past
        binding = session.io_binding()
        for name, given in zip(INPUTS, step_inputs(ids, position, order), strict=True):
            binding.bind_cpu_input(name, np.ascontiguousarray(given.numpy()))
        for i, (of_text, of_image) in enumerate(zip(past, of_images, strict=True)):
            binding.bind_ortvalue_input(f"past {i}", of_text)
            binding.bind_ortvalue_input(f"image {i}", of_image)
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")
        session.run_with_iobinding(binding)
        logits, *past = binding.get_outputs()
        return torch.from_numpy(logits.numpy().copy())

    return step
