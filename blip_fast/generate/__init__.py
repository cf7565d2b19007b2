"""Text generation: greedy, beam and nucleus search. All beams of an image read its keys and values where they lie."""

from blip_fast.generate.config import GenerationConfig
from blip_fast.generate.engine import Generated, Generation, Request, generate, generate_stream

__all__ = ["Generated", "Generation", "GenerationConfig", "Request", "generate", "generate_stream"]
