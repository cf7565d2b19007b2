"""OpenVINO's CPU plugin: float32, bfloat16 by its precision hint, and 8 bits by NNCF, with one and with two
of its execution streams (NUM_STREAMS).

The texts' keys and values are the decoder's state, which the plugin keeps and reorders itself. An execution
stream encodes one picture at a time; two of them have half of the threads each. In 8 bits the encoder is
quantised together with its activations (SmoothQuant, calibrated on noise), and the decoder's weights are
compressed, as in OpenVINO's own recipe for BLIP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import nncf  # pyright: ignore[reportMissingImports]
import numpy as np
import openvino as ov  # pyright: ignore[reportMissingImports]
import torch
from blip_kernels.cpu.processor import has_bfloat16
from openvino._offline_transformations import (  # pyright: ignore[reportMissingImports]
    apply_make_stateful_transformation,
)
from torch import Tensor

from blip_bench.peers.modules import INPUTS, Cut, Decoder, Peer, Step, empty_past, step_inputs

STREAMS = (1, 2)  # numbers of execution streams
STATE = {"float32": "f32", "bfloat16": "bf16", "int8": "u8"}  # precision of texts' keys and values


class Graphs(NamedTuple):
    vision: Any
    image_kv: Any
    decoder: Any


def peers(parts: Cut, pixels: Tensor, dtypes: Sequence[str]) -> Iterator[tuple[str, Peer]]:
    """A peer for each dtype and number of execution streams. `pixels` [images, 3, size, size] are an example
    input, and the calibration data for 8 bits."""
    graphs = convert(parts, pixels[:1])
    for dtype in dtypes:
        some = quantised(graphs, pixels) if dtype == "int8" else graphs
        wide = "bf16" if dtype == "bfloat16" or (dtype == "int8" and has_bfloat16()) else "f32"
        compile_graph = partial(_compile, wide=wide)
        begin = None
        if some.decoder is not None:
            request = compile_graph(some.decoder, state=STATE[dtype]).create_infer_request()
            begin = partial(_begin, compile_graph(some.image_kv), request)
        for streams in STREAMS:
            vision = compile_graph(some.vision, streams=streams)
            yield f"openvino {dtype}, streams {streams}", Peer(partial(_encode, vision, streams), begin)


def convert(parts: Cut, pixels: Tensor) -> Graphs:
    """Convert to graphs for any number of images and rows."""
    with torch.no_grad():
        shape = [-1, *pixels.shape[1:]]
        vision = ov.convert_model(parts.vision, example_input=pixels, input=shape)
        if parts.image_kv is None or parts.decoder is None:
            return Graphs(vision, None, None)
        embeds = parts.vision(pixels.repeat(2, 1, 1, 1))
        image_kv = ov.convert_model(parts.image_kv, example_input=embeds, input=[-1, *embeds.shape[1:]])
        return Graphs(vision, image_kv, _stateful(parts.decoder, parts.image_kv(embeds)))


def _stateful(decoder: Decoder, image_kv: tuple[Tensor, ...]) -> Any:
    """The decoder's graph with keys and values as state. Its inputs have the names that `_begin` uses."""
    rows, order = len(image_kv[0]), torch.arange(len(image_kv[0]))
    past = empty_past(decoder, rows, places=3)
    inputs = step_inputs(torch.zeros(rows, 1, dtype=torch.long), 3, order)
    graph = ov.convert_model(decoder, example_input=(*inputs, *past, *image_kv))
    numbers = range(len(past))
    names = [*INPUTS, *(f"past {i}" for i in numbers), *(f"image {i}" for i in numbers)]
    of_past, of_image = [-1, past[0].shape[1], -1, past[0].shape[3]], [-1, *image_kv[0].shape[1:]]
    shapes = [[-1, -1], [1, -1], [1, 1, -1, -1], [-1], *[of_past] * len(past), *[of_image] * len(past)]
    for port, name, shape in zip(graph.inputs, names, shapes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    for port, name in zip(graph.outputs, ["logits", *(f"present {i}" for i in numbers)], strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, {f"past {i}": f"present {i}" for i in numbers})
    graph.validate_nodes_and_infer_types()
    return graph


def quantised(graphs: Graphs, pixels: Tensor) -> Graphs:
    """8-bit copies of the graphs."""
    examples = nncf.Dataset([picture[None].numpy() for picture in pixels])
    vision = nncf.quantize(graphs.vision, examples, model_type=nncf.ModelType.TRANSFORMER,
                           subset_size=len(pixels))
    return Graphs(vision, *(graph and nncf.compress_weights(graph.clone()) for graph in graphs[1:]))


def _compile(graph: Any, wide: str, streams: int = 1, state: str | None = None) -> Any:
    how = {"NUM_STREAMS": streams} if streams > 1 else {"PERFORMANCE_HINT": "LATENCY"}
    how |= {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": wide}
    if state is not None:
        how["KV_CACHE_PRECISION"] = state
    return ov.Core().compile_model(graph, "CPU", how)


def _encode(vision: Any, streams: int, pixels: Tensor) -> Tensor:
    found: list[Any] = [None] * len(pixels)
    queue = ov.AsyncInferQueue(vision, streams)
    queue.set_callback(lambda request, i: found.__setitem__(i, request.get_output_tensor(0).data.copy()))
    for i, picture in enumerate(pixels.numpy()):
        queue.start_async({0: picture[None]}, i)
    queue.wait_all()
    return torch.from_numpy(np.concatenate(found))


def _begin(image_kv: Any, request: Any, embeds: Tensor) -> Step:
    found = image_kv({0: embeds.numpy()})
    for i, port in enumerate(image_kv.outputs):
        request.set_tensor(f"image {i}", ov.Tensor(np.ascontiguousarray(found[port])))
    request.reset_state()
    return partial(_step, request)


def _step(request: Any, ids: Tensor, position: int, order: Tensor) -> Tensor:
    inputs = step_inputs(ids, position, order)
    for name, value in zip(INPUTS, inputs, strict=True):
        request.set_tensor(name, ov.Tensor(np.ascontiguousarray(value.numpy())))
    request.infer()
    return torch.from_numpy(request.get_tensor("logits").data.copy())


