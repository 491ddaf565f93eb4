"""Ways to launch that no GPU has measured: off, but where `benchmarks/gpu_probes.py` tries them.

What wins there becomes the rule, and this file goes.

    DEPENDENT   a layer's launches are brought to the GPU while those before them end, and wait
                there (programmatic dependent launch, from sm_90 on)
    FEW_ROWS    up to so many rows that count, a product takes the tiles FEW_TILES, whatever its
                capacity; 0: tiles go by the capacity alone
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

DEPENDENT = False
FEW_ROWS = 0
FEW_TILES = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)


@triton.jit
def begin(DEPENDENT: tl.constexpr):
    """At the top of a kernel, before it reads: all launches before it have ended.

    Those that wait for this one may come at once: they read nothing before it has ended.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


def begins(x):
    """Options of a kernel that calls `begin`; x is one of its tensors."""
    if not DEPENDENT or (x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 9):
        return dict(DEPENDENT=False)
    return dict(DEPENDENT=True, launch_pdl=True)
