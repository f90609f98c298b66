"""Triton kernels of bidirectional varlen attention.

Shapes: T rows, S segments, H heads, K head_dim; M and N count the rows of a query tile and of a key tile.

A row of one head is read in place from `[T, H, K]` or `[T, 3, H, K]`. Tile widths are powers of two, so K is cut in
MAIN + TAIL lanes, two products in place of one: 72 is 64 + 16, 8 of the 16 masked, and masked lanes move no bytes.
Where K is an odd multiple of 8, every other head starts in the middle of a 32-byte sector: those heads put the tail in
front, so that the main part always fills whole sectors.

A program finds its (segment, head, block of rows) from its number. Segment S stands for the rows beyond
cu_seqlens[-1]: its programs write zeros there. Nothing is added atomically, so every result is deterministic.

Strides come divided by 8, which tells the compiler that they are multiples of 16 bytes.
Log-sum-exps are base 2 and contain the softmax scale: p = exp2(s * scale_log2 - lse).
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr, stride, rows, limit, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """A tile [rows, LANES]: zeros for rows >= limit and lanes >= WIDTH."""
    lanes = tl.arange(0, LANES)
    ptrs = ptr + rows[:, None] * stride + lanes[None, :]
    if LANES > WIDTH:
        x = tl.load(ptrs, mask=(rows[:, None] < limit) & (lanes[None, :] < WIDTH), other=0.0)
    else:
        x = tl.load(ptrs, mask=rows[:, None] < limit, other=0.0)
    return x


@triton.jit
def _store(ptr, stride, rows, limit, x, LANES: tl.constexpr, WIDTH: tl.constexpr):
    lanes = tl.arange(0, LANES)
    mask = (rows[:, None] < limit) & (lanes[None, :] < WIDTH)
    tl.store(ptr + rows[:, None] * stride + lanes[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _zero(ptr, stride, first, last, step, K: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Zeros in rows [first, first + ROWS), [first + step, first + step + ROWS), ... below last."""
    rows = tl.arange(0, ROWS)
    zeros = tl.zeros([ROWS, LANES], ptr.dtype.element_ty)
    for row in range(first, last, step):
        _store(ptr + tl.cast(row, tl.int64) * stride, stride, rows, last - row, zeros, LANES, K)


@triton.jit
def _place(blocks, H):
    """(segment, head, block) of this program: blocks of one head are neighbours, then heads of one segment."""
    pid = tl.program_id(0)
    return pid // blocks // H, (pid // blocks % H).to(tl.int64), pid % blocks


@triton.jit
def _cut(head, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """First lane of the main part, and the distance from there to the tail."""
    main = head * 0
    tail = head * 0 + MAIN
    if TAIL > 0 and K % 16 == 8:
        main = head % 2 * (K - MAIN)
        tail = MAIN - head % 2 * K
    return main, tail


@triton.jit
def _centred(dq, r, keys, count):
    """dq = sum(ds k) as sum(ds (k - c)), c being the mean of `count` keys [., LANES] of the segment.

    The two differ by r c, r = sum(ds) of each row. In exact arithmetic r is zero; what roundings make of it would be
    multiplied with all that keys have in common.
    """
    return dq - r[:, None] * (tl.sum(keys.to(tl.float32), 0) / count)[None, :]


@triton.jit
def _column_sums(x, M: tl.constexpr):
    """`[M, LANES]` -> the sums of its columns in float32, in each of M rows."""
    if x.dtype == tl.float32:
        sums = tl.broadcast_to(tl.sum(x, 0)[None, :], x.shape)
    else:
        sums = tl.dot(tl.full([M, M], 1.0, x.dtype), x)
    return sums


@triton.jit
def _low(x, rounded, LOW: tl.constexpr):
    """`low_order.of`, LOW being the shift."""
    rounded = rounded.to(tl.float32)
    low = (x.to(tl.int32, bitcast=True) - rounded.to(tl.int32, bitcast=True) + (1 << LOW >> 1)) >> LOW
    return tl.where(tl.abs(rounded) < float("inf"), tl.minimum(tl.maximum(low, -128), 127), 0)


@triton.jit
def _restored(out, low, stride, low_stride, rows, limit, LANES: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr):
    """A tile of the output in float32, as it was before it was rounded if LOW, the shift of `low_order`, is not 0."""
    x = _load(out, stride, rows, limit, LANES, WIDTH).to(tl.float32)
    if LOW > 0:
        more = _load(low, low_stride, rows, limit, LANES, WIDTH).to(tl.int32) << LOW
        x = (x.to(tl.int32, bitcast=True) + more).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _store_output(
    out, low, stride, low_stride, rows, limit, x, LANES: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr
):
    """A tile of the output, rounded; and, if LOW, what that took from it."""
    rounded = x.to(out.dtype.element_ty)
    _store(out, stride, rows, limit, rounded, LANES, WIDTH)
    if LOW > 0:
        _store(low, low_stride, rows, limit, _low(x, rounded, LOW), LANES, WIDTH)


@triton.jit(do_not_specialize=["T", "S", "blocks"])
def forward_kernel(
    q,
    k,
    v,
    out,
    low,
    lse,
    cu_seqlens,
    scale_log2,
    T,
    S,
    blocks,
    H,
    sqt,
    sqh,
    skt,
    skh,
    svt,
    svh,
    sot,
    soh,
    K: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SINGLE: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = softmax(q kT) v and lse, for M query rows of a head. SINGLE: no segment is longer than N.

    LOW: the shift of `low_order`, whose bytes are kept in `low`, contiguous; or 0, and none are.
    """
    WIDTH: tl.constexpr = min(K, MAIN)
    sqt, sqh, skt, skh, svt, svh, sot, soh = sqt * 8, sqh * 8, skt * 8, skh * 8, svt * 8, svh * 8, sot * 8, soh * 8
    segment, head, block = _place(blocks, H)
    row = block * M
    first = tl.load(cu_seqlens + segment)
    if segment == S:
        _zero(out + head * soh, sot, first + row, T, blocks * M, K, MAIN * 2, M)
        return
    length = tl.load(cu_seqlens + segment + 1) - first
    if row >= length:
        return
    first = first.to(tl.int64)
    main, tail = _cut(head, K, MAIN, TAIL)
    q += main + head * sqh + (first + row) * sqt
    k += main + head * skh + first * skt
    v += main + head * svh + first * svt
    out += main + head * soh + (first + row) * sot
    low += main + ((first + row) * H + head) * K
    lse += head * T + first + row

    rows = tl.arange(0, M)
    cols = tl.arange(0, N)
    left = length - row
    q_main = _load(q, sqt, rows, left, MAIN, WIDTH)
    q_tail = q_main
    acc = tl.zeros([M, MAIN], tl.float32)
    acc_tail = tl.zeros([M, TAIL if TAIL > 0 else 16], tl.float32)
    if TAIL > 0:
        q_tail = _load(q + tail, sqt, rows, left, TAIL, K - MAIN)
    if SINGLE:
        k_main = _load(k, skt, cols, length, MAIN, WIDTH)
        v_main = _load(v, svt, cols, length, MAIN, WIDTH)
        s = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
        if TAIL > 0:
            k_tail = _load(k + tail, skt, cols, length, TAIL, K - MAIN)
            v_tail = _load(v + tail, svt, cols, length, TAIL, K - MAIN)
            s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision=PRECISION)
        s = tl.where(cols[None, :] < length, s, float("-inf"))
        m = tl.max(s, 1) * scale_log2
        p = tl.exp2(s * scale_log2 - m[:, None])
        total = tl.sum(p, 1)
        p = p.to(q_main.dtype)
        acc = tl.dot(p, v_main, acc, input_precision=PRECISION)
        if TAIL > 0:
            acc_tail = tl.dot(p, v_tail, acc_tail, input_precision=PRECISION)
    else:
        m = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        for start in range(0, length, N):
            limit = length - start
            k_main = _load(k, skt, cols, limit, MAIN, WIDTH)
            v_main = _load(v, svt, cols, limit, MAIN, WIDTH)
            s = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
            if TAIL > 0:
                k_tail = _load(k + tail, skt, cols, limit, TAIL, K - MAIN)
                v_tail = _load(v + tail, svt, cols, limit, TAIL, K - MAIN)
                s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision=PRECISION)
            if limit < N:  # a branch, not a select in every turn: 15% of the time at length 1024
                s = tl.where(cols[None, :] < limit, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
            p = tl.exp2(s * scale_log2 - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            total = total * alpha + tl.sum(p, 1)
            m = m_new
            p = p.to(q_main.dtype)
            acc = tl.dot(p, v_main, acc * alpha[:, None], input_precision=PRECISION)
            if TAIL > 0:
                acc_tail = tl.dot(p, v_tail, acc_tail * alpha[:, None], input_precision=PRECISION)
            k += N * skt
            v += N * svt
    tl.store(lse + rows, m + tl.log2(total), mask=rows < left)
    _store_output(out, low, sot, H * K, rows, left, acc / total[:, None], MAIN, WIDTH, LOW)
    if TAIL > 0:
        acc_tail = acc_tail / total[:, None]
        _store_output(out + tail, low + tail, sot, H * K, rows, left, acc_tail, TAIL, K - MAIN, LOW)


@triton.jit(do_not_specialize=["T", "S", "blocks"])
def backward_q_kernel(
    q,
    k,
    v,
    out,
    low,
    grad,
    dq,
    lse,
    delta,
    cu_seqlens,
    scale,
    scale_log2,
    T,
    S,
    blocks,
    H,
    sqt,
    sqh,
    skt,
    skh,
    svt,
    svh,
    sot,
    soh,
    sgt,
    sgh,
    sdt,
    sdh,
    K: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of M query rows of a head, and delta = sum(p * dp), which backward_kv_kernel reads.

    sum(out * grad) is that delta but for roundings: of `out`, whose bytes the forward kept in `low` (LOW: the shift of
    `low_order`; 0: it has none), and of p before it was multiplied with v. What it lacks is the sum of ds.
    """
    WIDTH: tl.constexpr = min(K, MAIN)
    sqt, sqh, skt, skh, svt, svh, sot, soh = sqt * 8, sqh * 8, skt * 8, skh * 8, svt * 8, svh * 8, sot * 8, soh * 8
    sgt, sgh, sdt, sdh = sgt * 8, sgh * 8, sdt * 8, sdh * 8
    segment, head, block = _place(blocks, H)
    row = block * M
    first = tl.load(cu_seqlens + segment)
    if segment == S:
        _zero(dq + head * sdh, sdt, first + row, T, blocks * M, K, MAIN * 2, M)
        return
    length = tl.load(cu_seqlens + segment + 1) - first
    if row >= length:
        return
    first = first.to(tl.int64)
    main, tail = _cut(head, K, MAIN, TAIL)
    q += main + head * sqh + (first + row) * sqt
    k += main + head * skh + first * skt
    v += main + head * svh + first * svt
    out += main + head * soh + (first + row) * sot
    low += main + ((first + row) * H + head) * K
    grad += main + head * sgh + (first + row) * sgt
    dq += main + head * sdh + (first + row) * sdt
    lse += head * T + first + row
    delta += head * T + first + row

    rows = tl.arange(0, M)
    cols = tl.arange(0, N)
    left = length - row
    q_main = _load(q, sqt, rows, left, MAIN, WIDTH)
    g_main = _load(grad, sgt, rows, left, MAIN, WIDTH)
    d = tl.sum(_restored(out, low, sot, H * K, rows, left, MAIN, WIDTH, LOW) * g_main.to(tl.float32), 1)
    q_tail = q_main
    g_tail = g_main
    acc = tl.zeros([M, MAIN], tl.float32)
    acc_tail = tl.zeros([M, TAIL if TAIL > 0 else 16], tl.float32)
    if TAIL > 0:
        q_tail = _load(q + tail, sqt, rows, left, TAIL, K - MAIN)
        g_tail = _load(grad + tail, sgt, rows, left, TAIL, K - MAIN)
        o_tail = _restored(out + tail, low + tail, sot, H * K, rows, left, TAIL, K - MAIN, LOW)
        d += tl.sum(o_tail * g_tail.to(tl.float32), 1)
    r = tl.zeros([M], tl.float32)
    e = tl.load(lse + rows, mask=rows < left, other=float("inf"))
    for start in range(0, length, N):
        limit = length - start
        k_main = _load(k, skt, cols, limit, MAIN, WIDTH)
        v_main = _load(v, svt, cols, limit, MAIN, WIDTH)
        s = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
        dp = tl.dot(g_main, tl.trans(v_main), input_precision=PRECISION)
        if TAIL > 0:
            k_tail = _load(k + tail, skt, cols, limit, TAIL, K - MAIN)
            v_tail = _load(v + tail, svt, cols, limit, TAIL, K - MAIN)
            s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision=PRECISION)
            dp = tl.dot(g_tail, tl.trans(v_tail), dp, input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - e[:, None])
        if limit < N:  # a key of zeros has exp2(-lse), which may overflow
            p = tl.where(cols[None, :] < limit, p, 0.0)
        ds = (p * (dp - d[:, None])).to(q_main.dtype)
        r += tl.sum(ds.to(tl.float32), 1)
        acc = tl.dot(ds, k_main, acc, input_precision=PRECISION)
        if TAIL > 0:
            acc_tail = tl.dot(ds, k_tail, acc_tail, input_precision=PRECISION)
        k += N * skt
        v += N * svt
    tl.store(delta + rows, d + r, mask=rows < left)
    k -= tl.cdiv(length, N) * N * skt
    sample = tl.arange(0, M) * length // M  # of keys all over the segment
    acc = _centred(acc, r, _load(k, skt, sample, length, MAIN, WIDTH), M)
    _store(dq, sdt, rows, left, acc * scale, MAIN, WIDTH)
    if TAIL > 0:
        acc_tail = _centred(acc_tail, r, _load(k + tail, skt, sample, length, TAIL, K - MAIN), M)
        _store(dq + tail, sdt, rows, left, acc_tail * scale, TAIL, K - MAIN)


@triton.jit(do_not_specialize=["T", "S", "blocks"])
def backward_kv_kernel(
    q,
    k,
    v,
    grad,
    dk,
    dv,
    lse,
    delta,
    cu_seqlens,
    scale,
    scale_log2,
    T,
    S,
    blocks,
    H,
    sqt,
    sqh,
    skt,
    skh,
    svt,
    svh,
    sgt,
    sgh,
    sdt,
    sdh,
    K: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of N key rows of a head; the two share strides. Works on the transposed scores [N, M]."""
    WIDTH: tl.constexpr = min(K, MAIN)
    sqt, sqh, skt, skh, svt, svh = sqt * 8, sqh * 8, skt * 8, skh * 8, svt * 8, svh * 8
    sgt, sgh, sdt, sdh = sgt * 8, sgh * 8, sdt * 8, sdh * 8
    segment, head, block = _place(blocks, H)
    row = block * N
    first = tl.load(cu_seqlens + segment)
    if segment == S:
        _zero(dk + head * sdh, sdt, first + row, T, blocks * N, K, MAIN * 2, N)
        _zero(dv + head * sdh, sdt, first + row, T, blocks * N, K, MAIN * 2, N)
        return
    length = tl.load(cu_seqlens + segment + 1) - first
    if row >= length:
        return
    first = first.to(tl.int64)
    main, tail = _cut(head, K, MAIN, TAIL)
    q += main + head * sqh + first * sqt
    k += main + head * skh + (first + row) * skt
    v += main + head * svh + (first + row) * svt
    grad += main + head * sgh + first * sgt
    dk += main + head * sdh + (first + row) * sdt
    dv += main + head * sdh + (first + row) * sdt
    lse += head * T + first
    delta += head * T + first

    rows = tl.arange(0, M)
    cols = tl.arange(0, N)
    left = length - row
    k_main = _load(k, skt, cols, left, MAIN, WIDTH)
    v_main = _load(v, svt, cols, left, MAIN, WIDTH)
    k_tail = k_main
    v_tail = v_main
    dk_main = tl.zeros([N, MAIN], tl.float32)
    dv_main = tl.zeros([N, MAIN], tl.float32)
    dk_tail = tl.zeros([N, TAIL if TAIL > 0 else 16], tl.float32)
    dv_tail = tl.zeros([N, TAIL if TAIL > 0 else 16], tl.float32)
    if TAIL > 0:
        k_tail = _load(k + tail, skt, cols, left, TAIL, K - MAIN)
        v_tail = _load(v + tail, svt, cols, left, TAIL, K - MAIN)
    for start in range(0, length, M):
        limit = length - start
        q_main = _load(q, sqt, rows, limit, MAIN, WIDTH)
        g_main = _load(grad, sgt, rows, limit, MAIN, WIDTH)
        e = tl.load(lse + start + rows, mask=rows < limit, other=float("inf"))  # rows beyond the segment: p = 0
        d = tl.load(delta + start + rows, mask=rows < limit, other=0.0)
        s = tl.dot(k_main, tl.trans(q_main), input_precision=PRECISION)
        dp = tl.dot(v_main, tl.trans(g_main), input_precision=PRECISION)
        if TAIL > 0:
            q_tail = _load(q + tail, sqt, rows, limit, TAIL, K - MAIN)
            g_tail = _load(grad + tail, sgt, rows, limit, TAIL, K - MAIN)
            s = tl.dot(k_tail, tl.trans(q_tail), s, input_precision=PRECISION)
            dp = tl.dot(v_tail, tl.trans(g_tail), dp, input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - e[None, :])
        ds = (p * (dp - d[None, :])).to(q_main.dtype)
        p = p.to(q_main.dtype)
        dv_main = tl.dot(p, g_main, dv_main, input_precision=PRECISION)
        dk_main = tl.dot(ds, q_main, dk_main, input_precision=PRECISION)
        if TAIL > 0:
            dv_tail = tl.dot(p, g_tail, dv_tail, input_precision=PRECISION)
            dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision=PRECISION)
        q += M * sqt
        grad += M * sgt
    _store(dk, sdt, cols, left, dk_main * scale, MAIN, WIDTH)
    _store(dv, sdt, cols, left, dv_main, MAIN, WIDTH)
    if TAIL > 0:
        _store(dk + tail, sdt, cols, left, dk_tail * scale, TAIL, K - MAIN)
        _store(dv + tail, sdt, cols, left, dv_tail, TAIL, K - MAIN)


@triton.jit(do_not_specialize=["T", "S"])
def backward_short_kernel(
    q,
    k,
    v,
    grad,
    dq,
    dk,
    dv,
    lse,
    cu_seqlens,
    scale,
    scale_log2,
    T,
    S,
    H,
    sqt,
    sqh,
    skt,
    skh,
    svt,
    svh,
    sgt,
    sgh,
    sdt,
    sdh,
    K: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, dk and dv (which share strides) of a head of a segment of at most M rows, all in one tile.

    The tile holds whole rows of p, so delta is sum(p * dp), and `out` is not read. dq is `_centred`. Sums are along
    rows, which few lanes of a warp share, or products: a sum along columns is one of all warps, and waits for them.
    """
    WIDTH: tl.constexpr = min(K, MAIN)
    sqt, sqh, skt, skh, svt, svh = sqt * 8, sqh * 8, skt * 8, skh * 8, svt * 8, svh * 8
    sgt, sgh, sdt, sdh = sgt * 8, sgh * 8, sdt * 8, sdh * 8
    segment, head, _ = _place(1, H)
    first = tl.load(cu_seqlens + segment)
    if segment == S:
        _zero(dq + head * sdh, sdt, first, T, M, K, MAIN * 2, M)
        _zero(dk + head * sdh, sdt, first, T, M, K, MAIN * 2, M)
        _zero(dv + head * sdh, sdt, first, T, M, K, MAIN * 2, M)
        return
    length = tl.load(cu_seqlens + segment + 1) - first
    first = first.to(tl.int64)
    main, tail = _cut(head, K, MAIN, TAIL)
    q += main + head * sqh + first * sqt
    k += main + head * skh + first * skt
    v += main + head * svh + first * svt
    grad += main + head * sgh + first * sgt
    dq += main + head * sdh + first * sdt
    dk += main + head * sdh + first * sdt
    dv += main + head * sdh + first * sdt

    rows = tl.arange(0, M)
    q_main = _load(q, sqt, rows, length, MAIN, WIDTH)
    k_main = _load(k, skt, rows, length, MAIN, WIDTH)
    v_main = _load(v, svt, rows, length, MAIN, WIDTH)
    g_main = _load(grad, sgt, rows, length, MAIN, WIDTH)
    if TAIL > 0:
        q_tail = _load(q + tail, sqt, rows, length, TAIL, K - MAIN)
        k_tail = _load(k + tail, skt, rows, length, TAIL, K - MAIN)
        v_tail = _load(v + tail, svt, rows, length, TAIL, K - MAIN)
        g_tail = _load(grad + tail, sgt, rows, length, TAIL, K - MAIN)
    e = tl.load(lse + head * T + first + rows, mask=rows < length, other=float("inf"))
    s = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)  # [queries, keys]
    dp = tl.dot(g_main, tl.trans(v_main), input_precision=PRECISION)
    if TAIL > 0:
        s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision=PRECISION)
        dp = tl.dot(g_tail, tl.trans(v_tail), dp, input_precision=PRECISION)
    p = tl.exp2(s * scale_log2 - e[:, None])
    p = tl.where(rows[None, :] < length, p, 0.0)  # a key of zeros has exp2(-lse), which may overflow
    inverse = 1.0 / tl.where(rows < length, tl.sum(p, 1), 1.0)  # lse may be that of a rounded p
    delta = tl.sum(p * dp, 1) * inverse
    p *= inverse[:, None]
    ds = (p * (dp - delta[:, None])).to(q_main.dtype)
    r = tl.sum(ds.to(tl.float32), 1) / -length
    dq_main = tl.dot(ds, k_main, r[:, None] * _column_sums(k_main, M), input_precision=PRECISION)
    _store(dq, sdt, rows, length, dq_main * scale, MAIN, WIDTH)
    if TAIL > 0:
        dq_tail = tl.dot(ds, k_tail, r[:, None] * _column_sums(k_tail, M), input_precision=PRECISION)
        _store(dq + tail, sdt, rows, length, dq_tail * scale, TAIL, K - MAIN)
    p, ds = tl.trans(p.to(q_main.dtype)), tl.trans(ds)  # [keys, queries]
    _store(dv, sdt, rows, length, tl.dot(p, g_main, input_precision=PRECISION), MAIN, WIDTH)
    _store(dk, sdt, rows, length, tl.dot(ds, q_main, input_precision=PRECISION) * scale, MAIN, WIDTH)
    if TAIL > 0:
        _store(dv + tail, sdt, rows, length, tl.dot(p, g_tail, input_precision=PRECISION), TAIL, K - MAIN)
        _store(dk + tail, sdt, rows, length, tl.dot(ds, q_tail, input_precision=PRECISION) * scale, TAIL, K - MAIN)
