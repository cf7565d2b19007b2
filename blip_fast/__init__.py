"""blip_fast: BLIP (Li et al., ICML 2022) for training and inference at speed.

    from blip_fast import Answerer, Captioner, Classifier, Explainer, Matcher, Retriever
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blip_fast.tasks.answerer import Answerer
    from blip_fast.tasks.captioner import Captioner
    from blip_fast.tasks.classifier import Classifier
    from blip_fast.tasks.explainer import Explainer
    from blip_fast.tasks.matcher import Matcher
    from blip_fast.tasks.retriever import Retriever

__all__ = ["Answerer", "Captioner", "Classifier", "Explainer", "Matcher", "Retriever"]


def __getattr__(name: str) -> object:
    """A task is imported, and PyTorch with it, when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'blip_fast' has no attribute {name!r}")
    return getattr(import_module(f"blip_fast.tasks.{name.lower()}"), name)


def __dir__() -> list[str]:
    return __all__
