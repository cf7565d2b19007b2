"""CapFilt: a captioner writes a caption for each web image, a filter keeps the texts that fit (BLIP section 3.3)."""

from blip_fast.capfilt.clean import CapFiltConfig, CapFiltResult, CapFiltRow, WebBatch, capfilt, capfilt_batch
from blip_fast.capfilt.quality import FilterQuality, filter_quality

__all__ = ["CapFiltConfig", "CapFiltResult", "CapFiltRow", "FilterQuality", "WebBatch", "capfilt", "capfilt_batch",
           "filter_quality"]
