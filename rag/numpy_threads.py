"""NumPy's products on one thread: those of retrieval are too small to share out.

OpenBLAS wakes a thread a core for every product and lets them wait in a busy loop. On two cores of
which another program used one, reading the passages of a question took 192 ms with its default and
23 ms with one thread; alone on the machine both take about the same.
"""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=1)
def keep_numpy_to_one_thread() -> None:
    """Once a process, and for all of it. What FAISS and torch use stays as it is."""
    import numpy as np  # noqa: F401 - its library must be loaded to be found
    from threadpoolctl import ThreadpoolController

    ThreadpoolController().select(user_api="blas", prefix="libscipy_openblas").limit(limits=1)
