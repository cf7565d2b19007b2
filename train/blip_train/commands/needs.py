"""What training needs in addition to an installation that runs models."""

from __future__ import annotations

from blip_fast.doctor import is_there


def require_training() -> None:
    """Raises ValueError if DeepSpeed or DALI is not installed, before anything imports them."""
    missing = [name for name, module in (("DeepSpeed", "deepspeed"), ("DALI", "nvidia.dali"))
               if not is_there(module)]
    if missing:
        raise ValueError(f"training needs {' and '.join(missing)}, not installed here: on Linux "
                         "pip install 'blip-fast[train,dali-cuda12]' (with CUDA 13 dali-cuda13)")
