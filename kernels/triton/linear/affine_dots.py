"""Affine GEMM for a few tokens with as little arithmetic per weight as there can be.

Codes enter the tensor cores as they are: or-ed into the mantissa of a power
of two and nothing else, not centred, not scaled. Each group's product
d = Σ (base + code·2^p)·x and the sum X = Σ x (a product with ones) then give

    Σ w·x = scale·2^-p · d + (offset − scale·(base·2^-p + 2^(bits−1))) · X

in float32, once per group and output instead of once per weight. Planes that
lie within the mantissa's bits (7 in bfloat16, 10 in float16) need no shift of
their own: 2^p takes it up.

Base and code sum to at most 2^8 of the code's step, exact in x's dtype; the
products and their sums are the tensor core's, in float32. base·X cancels in
the second term: it costs log2(base / 2^bits) of float32's 24 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.activation import activated
from qcompiler.kernels.triton.launch import wait_for_earlier
from qcompiler.kernels.triton.linear.affine_codes import interleave
from qcompiler.kernels.triton.linear.x_pairs import pair_floats


@triton.constexpr_function
def _planes_per_shift(bits: int, low_bits: int, half: tl.dtype) -> int:
    """How many neighbouring planes of codes fit the mantissa without being moved."""
    mantissa = 7 if half == tl.bfloat16 else 10
    return (mantissa - bits) // low_bits + 1


def _plane_assembly(bits: int, low_bits: int, j: int, shift: int, half: tl.dtype) -> str:
    """PTX: plane j of a register $1 of two neighbours' low bits (and $2 of their high bits) to a pair $0."""
    p = j * low_bits - shift
    magic = 0x43004300 if half == tl.bfloat16 else 0x64006400
    mask = ((1 << low_bits) - 1) * 0x00010001 << p
    lines = ["{ .reg .b32 w, m;", f"mov.b32 m, {magic:#x};", f"shr.u32 w, $1, {shift};"]
    high_bits = bits - low_bits
    if not high_bits:
        return " ".join([*lines, f"lop3.b32 $0, w, {mask:#x}, m, 0xEA; }}"])
    up = high_bits * j - low_bits - p
    moved = f"shr.u32 w, $2, {up};" if up >= 0 else f"shl.b32 w, $2, {-up};"
    high_mask = ((1 << high_bits) - 1) * 0x00010001 << (low_bits + p)
    return " ".join(
        [*lines, f"lop3.b32 m, w, {mask:#x}, m, 0xEA;", moved, f"lop3.b32 $0, w, {high_mask:#x}, m, 0xEA; }}"]
    )


_assembly = triton.constexpr_function(_plane_assembly)


@triton.jit
def _raw(word, upper, j: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, COMPILED: tl.constexpr):
    """Base + code·2^p of plane j, of dtype HALF (float32 in the interpreter), and p.

    word int16 [rows, WIDTH]: the low bits of one code of each plane; upper int16: their high bits.
    """
    LOW: tl.constexpr = 2 if BITS < 4 else 4
    TOGETHER: tl.constexpr = _planes_per_shift(BITS, LOW, HALF)
    SHIFT: tl.constexpr = j // TOGETHER * TOGETHER * LOW
    P: tl.constexpr = j * LOW - SHIFT
    if COMPILED:
        ASM: tl.constexpr = _assembly(BITS, LOW, j, SHIFT, HALF)
        # The second register is not read where there are no high bits.
        if HALF == tl.bfloat16:
            value = tl.inline_asm_elementwise(
                ASM, "=r,r,r", [word, upper], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            value = tl.inline_asm_elementwise(
                ASM, "=r,r,r", [word, upper], dtype=tl.float16, is_pure=True, pack=2
            )
    else:
        code = (word.to(tl.int32) >> (LOW * j)) & ((1 << LOW) - 1)
        if BITS > LOW:
            code |= ((upper.to(tl.int32) >> ((BITS - LOW) * j)) & ((1 << (BITS - LOW)) - 1)) << LOW
        value = code.to(tl.float32) * (1 << P) + (128.0 if HALF == tl.bfloat16 else 1024.0)
    return value, P


@triton.jit
def _ones_like(word, upper, HALF: tl.constexpr, COMPILED: tl.constexpr):
    """Ones of dtype HALF, formally made from the words int16.

    The compiler lays out the operands of a product by the loads behind them, and only with equal layouts do
    both products read one copy of x.
    """
    if COMPILED:
        if HALF == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "mov.b32 $0, 0x3F803F80;", "=r,r,r", [word, upper], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                "mov.b32 $0, 0x3C003C00;", "=r,r,r", [word, upper], dtype=tl.float16, is_pure=True, pack=2
            )
    else:
        return tl.full(word.shape, 1.0, tl.float32)


@triton.jit
def _load_sides(sides, tile, SIDES: tl.constexpr, CODES: tl.constexpr, GROUP: tl.constexpr):
    """The SIDES pairs of scale and offset of one tile of CODES codes, each [rows]."""
    held = ()
    for i in tl.static_range(SIDES):
        if SIDES > 1:
            group = tile * SIDES + i
        else:
            group = tile * CODES // GROUP if GROUP else tile * 0
        held = held + (tl.load(sides + group),)  # type: ignore[assignment]
    return held


@triton.jit
def linear_affine_dots(
    x,
    low,
    high,
    sides,
    bias,
    out,
    M,
    N,
    K,
    side_stride,
    row_words,
    x_stride,
    tiles_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDES: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPILED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(N, BN·PARTS)·cdiv(M, BM), SPLIT); WIDTH ≥ 16; BITS 2, 3, 4 or 6.

    x [M, K] rows x_stride apart; low int16 [N, row_words], two of the format's halves of words to each pair
    of codes; high uint8 [N, row_words]; sides [N, side_stride], SIDES of them per tile. out [M, N] in x's
    dtype, or float32 partial sums [SPLIT, M, N] when SPLIT > 1. A program has PARTS tiles of BN rows: with
    no more than 16 rows to a warp the compiler loads sides where they are used. ACTIVATION: None or that of
    the first half of the rows, by which the second half is multiplied; out is then [M, N/2], SPLIT 1, and
    half of the PARTS, an even number, are gates. PDL: see `launch.py`.
    """
    PLANES: tl.constexpr = 8 if BITS < 4 else 4
    TILE: tl.constexpr = PLANES * WIDTH
    HAS_HIGH: tl.constexpr = BITS == 3 or BITS == 6
    BASE: tl.constexpr = 128.0 if HALF == tl.bfloat16 else 1024.0
    CENTRE: tl.constexpr = 1 << (BITS - 1)

    pid = tl.program_id(0)
    split = tl.program_id(1)
    tiles_m = tl.cdiv(M, BM)
    # Tiles of a program: PARTS neighbours, or OWN of gates and the OWN that go with them.
    OWN: tl.constexpr = PARTS // 2 if ACTIVATION is not None else PARTS
    channels = N // 2 if ACTIVATION is not None else N
    first_row = (pid // tiles_m) * (BN * OWN)
    pid_m = (pid % tiles_m).to(tl.int64)
    rm = (pid_m * BM + tl.arange(0, BM)).to(tl.int32)
    lane = tl.arange(0, WIDTH)
    x += pid_m * BM * x_stride
    x_rows = tl.arange(0, BM) * x_stride

    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K, TILE))
    nothing = tl.zeros((BN, BM), dtype=tl.float32)
    wait_for_earlier(PDL)
    sums = ()
    rows = ()
    ahead = ()
    for part in tl.static_range(PARTS):
        # Rows past the end read the last row and are not stored, so that no load of the weight needs a mask.
        own = first_row + part % OWN * BN + tl.arange(0, BN)
        row = (tl.minimum(own, channels - 1) + part // OWN * channels).to(tl.int64)
        sums = sums + (nothing,)  # type: ignore[assignment]
        rows = rows + (row,)  # type: ignore[assignment]
        ahead = ahead + (_load_sides(sides + row * side_stride, first, SIDES, TILE, GROUP),)  # type: ignore[assignment]
    for tile in range(first, last):
        at = tile * WIDTH + lane
        words = ()
        uppers = ()
        # Sides come one tile ahead, because the compiler pipelines only what goes into a product.
        held = ahead
        following = ()
        for part in tl.static_range(PARTS):
            word = tl.load(low + rows[part][:, None] * row_words + at[None, :])
            upper = word
            if HAS_HIGH:
                pair_at = tile * (WIDTH // 2) + tl.arange(0, WIDTH // 2)
                both = tl.load(high + rows[part][:, None] * (row_words // 2) + pair_at[None, :])
                upper = interleave(both & 0xFF, (both >> 8) & 0xFF)
            words = words + (word,)  # type: ignore[assignment]
            uppers = uppers + (upper,)  # type: ignore[assignment]
            next_tile = tl.minimum(tile + 1, last - 1)
            following = following + (
                _load_sides(sides + rows[part] * side_stride, next_tile, SIDES, TILE, GROUP),
            )  # type: ignore[assignment]
        ahead = following
        ones = _ones_like(words[0], uppers[0], HALF, COMPILED)  # type: ignore[misc]
        for j in tl.static_range(PLANES):
            k = tile * TILE + j * WIDTH + lane
            x_mask = rm[None, :] < M
            if not EVEN_K:
                x_mask = x_mask & (k[:, None] < K)
            xt = tl.load(x + x_rows[None, :] + k[:, None], mask=x_mask, other=0.0)
            if not COMPILED:
                xt = xt.to(tl.float32)
            total = tl.dot(ones, xt, nothing, input_precision="ieee")
            grown = ()
            for part in tl.static_range(PARTS):
                raw, P = _raw(words[part], uppers[part], j, BITS, HALF, COMPILED)
                d = tl.dot(raw, xt, nothing, input_precision="ieee")
                side = held[part][j * WIDTH // GROUP] if SIDES > 1 else held[part][0]  # type: ignore[var-annotated]
                scale, offset = pair_floats(side, HALF)
                step = scale * (1.0 / (1 << P))
                sum_ = sums[part] + step[:, None] * d
                sum_ += (offset - (step * BASE + scale * CENTRE))[:, None] * total
                grown = grown + (sum_,)  # type: ignore[assignment]
            sums = grown

    out += split.to(tl.int64) * M * N + pid_m * BM * channels
    for part in tl.static_range(OWN):
        rn = first_row + part * BN + tl.arange(0, BN)
        y = sums[part]  # type: ignore[var-annotated]
        if HAS_BIAS:
            y += tl.load(bias + rn, mask=rn < channels, other=0.0).to(tl.float32)[:, None]
        if ACTIVATION is not None:
            times = sums[OWN + part]  # type: ignore[var-annotated]
            if HAS_BIAS:
                times += tl.load(bias + channels + rn, mask=rn < channels, other=0.0).to(tl.float32)[:, None]
            y = activated(y, times, ACTIVATION, out.dtype.element_ty)
        offsets = tl.arange(0, BM).to(tl.int64)[None, :] * channels + rn[:, None]
        mask = (rn[:, None] < channels) & (rm[None, :] < M)
        tl.store(out + offsets, y.to(out.dtype.element_ty), mask=mask)
