"""The lower layer of ``optax_lowmem``: formats, programs and operations on arrays.

Every operation is a pure function. ``implementation=`` selects XLA or a Mosaic GPU kernel.
"""

from pallas_kernels.formats.state_formats import StateFormat as StateFormat
from pallas_kernels.formats.weights import DeltaFormat as DeltaFormat
from pallas_kernels.operations.apply_update import apply_update as apply_update
from pallas_kernels.operations.fused_update import fused_update as fused_update
from pallas_kernels.operations.merge import merge as merge
from pallas_kernels.operations.split import split as split
from pallas_kernels.operations.stochastic_round import stochastic_round as stochastic_round
