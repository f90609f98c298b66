"""The softmax of the forward for Hopper, of scores that come tile by tile.

P = exp2(S * scale_log2 - m). But for rounding, results do not depend on m, which keeps P from overflow: after the first
tile it is raised to a row's maximum only where that is more than GROWTH above it, and O rescaled. P stays within
2 ** GROWTH, which float16 holds, and is never smaller than with the maximum itself. Each row decides for itself; a warp
that raises none skips the products.
"""

# mypy: disable-error-code="assignment"
# (a tuple grows where Triton unrolls the loop)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from siglip2_packed.ops.attention.hopper_tiles import ACC

GROWTH = gl.constexpr(8.0)

# for the two rows that a thread has part in: whether one of the warp's rows has another factor than 1
ANY = gl.constexpr("""{
.reg .pred p, q;
setp.neu.f32 p, $2, 0f3F800000;
setp.neu.or.f32 p, $3, 0f3F800000, p;
vote.sync.any.pred q, p, 0xffffffff;
selp.b32 $0, 1, 0, q;
selp.b32 $1, 1, 0, q;
}""")


def _products(count: int) -> str:
    """Multiplies `count` registers by as many if a flag is set, behind a branch."""
    products = [f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)]
    lines = ["{", ".reg .pred p;", f"setp.ne.s32 p, ${3 * count}, 0;", "@!p bra DONE;", *products, "DONE:", "}"]
    return "\n".join(lines)


def _operands(count: int) -> str:
    """The registers, in and out; factors; flags, all alike."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count + ["r"] * count)


# by the registers that a thread has of an accumulator of 64 rows and 64, 16, or 8 lanes
PRODUCTS, OPERANDS = (gl.constexpr({count: of(count) for count in (32, 8, 4)}) for of in (_products, _operands))


@gluon.jit
def row_max(s):
    """Of [64, 64]. A thread has pairs of eight columns of a row: it takes maxima by two and two, not one by one."""
    x = gl.max(s.reshape([64, 8, 4, 2]), 3).reshape([64, 2, 2, 2, 4])
    x = gl.max(gl.max(gl.max(x, 3), 2), 1)
    return gl.convert_layout(gl.max(x, 1), gl.SliceLayout(1, ACC[0]))


@gluon.jit
def softmax(s, m, scale_log2):
    """P, the new m, and what O is to be multiplied with."""
    top = row_max(s) * scale_log2
    raised = gl.where(top > m + GROWTH, top, m)
    alpha = gl.exp2(m - raised)
    return gl.exp2(s * scale_log2 - raised[:, None]), raised, alpha


@gluon.jit
def _rescaled(x, alpha, some):
    ROW: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    COUNT: gl.constexpr = x.shape[1] // 2
    asm: gl.constexpr = PRODUCTS[COUNT]
    operands: gl.constexpr = OPERANDS[COUNT]
    alpha, some = gl.convert_layout(alpha, ROW)[:, None], gl.convert_layout(some, ROW)[:, None]
    return gl.inline_asm_elementwise(asm, operands, [x, alpha, some], gl.float32, True, COUNT)


@gluon.jit
def rescaled(o, alpha):
    """O times alpha, row by row, where a warp has a row with another factor than 1."""
    some = gl.inline_asm_elementwise(ANY, "=r,=r,f,f", [alpha], gl.int32, True, 2)
    found = ()
    for i in gl.static_range(len(o)):
        found += (_rescaled(o[i], alpha, some),)
    return found
