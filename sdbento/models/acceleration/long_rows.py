"""Has torch.compile read long rows once.

Of rows of more than 1024 numbers, torch's own kernels read each again for every part of their
reduction: the mean of a layer norm, its variance, the largest number that fp8 scales by. There is
room for 8192 of them in registers; SDXL's rows have 1280, and 5120 between linear layers.
"""

from __future__ import annotations

from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

LONGEST = 8192


class LongRows(InductorChoices):
    """torch's choices but for rows up to LONGEST, which stay in registers."""

    @staticmethod
    def should_use_persistent_reduction(
        features: SIMDKernelFeatures, cooperative_reduction: bool
    ) -> bool:
        """Whether a kernel holds the whole row that it reduces."""
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        hint, length = features.get_reduction_hint(), features.reduction_numel
        along_rows = hint in (ReductionHint.INNER, ReductionHint.DEFAULT)
        return along_rows and bool(V.graph.sizevars.statically_known_leq(length, LONGEST))
