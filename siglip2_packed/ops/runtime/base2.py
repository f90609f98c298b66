"""Kernels take exponentials to base 2: exp(x) = exp2(LOG2_E x)."""

import math

LOG2_E = math.log2(math.e)
