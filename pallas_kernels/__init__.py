"""The ground floor of `optax_lowmem`: arithmetic, launching, and operations.

Pure functions on arrays, with Mosaic GPU kernels behind `implementation=`.
"""

from pallas_kernels.apply_update import apply_update as apply_update
from pallas_kernels.formats import DeltaFormat as DeltaFormat
from pallas_kernels.fused_update import fused_update as fused_update
from pallas_kernels.merge import merge as merge
from pallas_kernels.split import split as split
from pallas_kernels.state_formats import StateFormat as StateFormat
from pallas_kernels.stochastic_round import stochastic_round as stochastic_round
