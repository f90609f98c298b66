"""GELU's tanh form as kernels write it.

gelu(u) = u (1 + tanh z) / 2 = u sigmoid(2z), z = sqrt(2/pi) (u + 0.044715 u³): 2z is SLOPE u + CUBIC u³.
"""

from siglip2_packed.ops.runtime.base2 import LOG2_E

SLOPE = 2 * 0.7978845608028654
CUBIC = SLOPE * 0.044715
# -2z to base 2, as sigmoid(2z) = 1 / (1 + exp2(-2z log2 e)) takes it
SLOPE_LOG2, CUBIC_LOG2 = -LOG2_E * SLOPE, -LOG2_E * CUBIC
