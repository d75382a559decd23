"""Imports everything that any section needs; for multiprocessing's fork server, once for all."""

from sdbento.process.heavy_imports import without_collector

with without_collector():
    from bench.gpu.sections import (  # noqa: F401
        ceilings,
        compiled,
        correctness,
        eager,
        fp8,
        graphs,
        kernels,
        loading,
        serving,
        vae,
        versions,
    )
