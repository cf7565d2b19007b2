"""Search among images by text or by image: an index on disk, exact or approximate search, re-ranking by
ITM."""

from blip_fast.search.index import AddReport, Hit, Index

__all__ = ["AddReport", "Hit", "Index"]
