"""Text generation: greedy, beam and nucleus search. All beams of an image read its keys and values where they
lie."""

from blip_fast.generate.continuous_batch import Generated, Generation, Request
from blip_fast.generate.generation import generate, generate_stream
from blip_fast.generate.generation_config import GenerationConfig

__all__ = ["Generated", "Generation", "GenerationConfig", "Request", "generate", "generate_stream"]
