"""float8_e4m3fn: four bits of exponent, three of mantissa, no infinities."""

LARGEST = 448.0
