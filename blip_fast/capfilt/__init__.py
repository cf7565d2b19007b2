"""CapFilt: a captioner writes a caption for each web image, and a filter keeps the texts that match (BLIP
section 3.3)."""

from blip_fast.capfilt.clean import (
    CapFiltConfig,
    CapFiltResult,
    CapFiltRow,
    WebBatch,
    WebImage,
    capfilt,
    capfilt_batch,
    capfilt_stream,
)
from blip_fast.capfilt.quality import FilterQuality, filter_quality

__all__ = ["CapFiltConfig", "CapFiltResult", "CapFiltRow", "FilterQuality", "WebBatch", "WebImage", "capfilt",
           "capfilt_batch", "capfilt_stream", "filter_quality"]
