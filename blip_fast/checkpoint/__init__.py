"""Checkpoints: transformers' layout, the published `.pth` and our own, read and written.

`names.py` maps names and shapes between the three, bit for bit; the other files know one form each.
"""

from blip_fast.checkpoint.hugging_face import save_hugging_face
from blip_fast.checkpoint.loading import load_model, load_training_state
from blip_fast.checkpoint.native import save_native
from blip_fast.checkpoint.nlvr2 import reasoning_model
from blip_fast.checkpoint.original import save_original

__all__ = ["load_model", "load_training_state", "reasoning_model", "save_hugging_face", "save_native",
           "save_original"]
