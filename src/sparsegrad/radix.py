"""The kernels of :func:`sparsegrad.kernels.radix_top_k`, in Triton; imported where it is called.

The bits of an absolute value, read as an integer, are in its order. ``counts`` is a histogram of 65,536 bins a row. It
is filled three times, and each time leaves a narrower range of bits that holds the k-th largest entry. ``state`` says
after each of them, for each row: the lower end of that range, the logarithm of its width, and how many entries of it
are kept.

1. All entries are read once. Eight neighbours have one maximum, which is stored, and ``GROUP`` of them have one, which
   is counted. The k-th largest of the counted ones is a bound that at least k entries reach, and few others.
2. Neighbours whose maximum reaches the bound are listed, in their order. The rest is never read again.
3. Of those listed the entries from the bound on are counted; then those of the bin that holds the k-th, one value a
   bin. That is the threshold.

Blocks then count what lies above the threshold and what equals it, their sums say where each block writes, and those
that equal it are taken in the order of their indices until k are full.
"""

import triton
import triton.language as tl

SIDE = tl.constexpr(256)  # a row's bins, seen as a square
BINS = tl.constexpr(256 * 256)
BITS = tl.constexpr(15)  # of 31, that the first histogram does not see
INFINITY = tl.constexpr(0x7F800000 >> 15)  # its bin there; those of NaN are the same and the next ones
NEAR = tl.constexpr(8)  # neighbours, 32 bytes: what a device reads at once


@triton.jit
def magnitude_bits(values):
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def count(bins, digits, counted):
    """Add to a row's histogram; the lowest digit in one piece, as all of a constant row have it."""
    lowest = counted & (digits == 0)
    number = tl.sum(lowest.to(tl.int32))
    tl.atomic_add(bins, number, mask=number > 0, sem="relaxed")
    tl.atomic_add(bins + digits, 1, mask=counted & (digits > 0), sem="relaxed")


@triton.jit
def read_maxima(G, counts, near, bad, n, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = block.to(tl.int64) * BLOCK
    length = tl.minimum(n - start, BLOCK).to(tl.int32)
    number: tl.constexpr = BLOCK // NEAR
    offsets = tl.arange(0, number)[:, None] * NEAR + tl.arange(0, NEAR)[None, :]
    values = tl.load(G + row * n + start + offsets, mask=offsets < length, other=0.0)
    maxima = tl.max(magnitude_bits(values), 1) >> BITS
    at = near + (row * tl.num_programs(0) + block) * number
    tl.store(at + tl.arange(0, number), maxima.to(tl.int16))
    counted = tl.max(tl.reshape(maxima, (BLOCK // GROUP, GROUP // NEAR)), 1)
    count(counts + row * BINS, counted, counted >= 0)
    tl.store(bad, 1, mask=tl.max(counted) >= INFINITY)


@triton.jit(do_not_specialize=["rows", "k"])
def narrow(counts, state, rows, k, LEVEL: tl.constexpr):
    """Find the bin that the k-th largest entry lies in, and write the next state."""
    row = tl.program_id(0).to(tl.int64)
    after = state + (LEVEL * rows + row) * 3
    before = after - rows * 3
    line = tl.arange(0, SIDE)
    bins = tl.load(counts + row * BINS + line[:, None] * SIDE + line[None, :])
    need = k
    if LEVEL > 0:
        need = tl.load(before + 2)
    lines = tl.sum(bins, 1)  # first which line of bins, then which of its bins
    upper = tl.sum((tl.cumsum(lines, 0, reverse=True) >= need).to(tl.int32)) - 1
    need -= tl.sum(tl.where(line > upper, lines, 0))
    own = tl.sum(tl.where(line[:, None] == upper, bins, 0), 0)
    lower = tl.sum((tl.cumsum(own, 0, reverse=True) >= need).to(tl.int32)) - 1
    need -= tl.sum(tl.where(line > lower, own, 0))
    digit = upper * SIDE + lower
    if LEVEL == 0:
        digit = tl.maximum(digit, 0)  # fewer groups than k: all entries are candidates
        index = line[:, None] * SIDE + line[None, :]
        width = tl.max(tl.max(tl.where(bins > 0, index, 0), 1), 0) - digit + 1
        low = digit << BITS
        shift = tl.sum((width > (2 << tl.arange(0, 16))).to(tl.int32))  # a bin of the next level has 2^shift values
        need = k  # of the entries: so far groups were counted
    elif LEVEL == 1:
        shift = tl.load(before + 1)
        low = tl.load(before) + (digit << shift)
    else:
        shift = 0
        low = tl.load(before) + digit
    tl.store(after, low)
    tl.store(after + 1, shift)
    tl.store(after + 2, need)


@triton.jit
def list_near(near, state, sizes, NUMBER: tl.constexpr):
    """Overwrite a block's maxima by the places of those that reach the bound."""
    row = tl.program_id(1).to(tl.int64)
    own = row * tl.num_programs(0) + tl.program_id(0)
    place = tl.arange(0, NUMBER)
    maxima = tl.load(near + own * NUMBER + place).to(tl.int32) & 0xFFFF
    tl.debug_barrier()  # all are read before one is overwritten
    listed = (maxima >= (tl.load(state + row * 3) >> BITS)).to(tl.int32)
    tl.store(near + own * NUMBER + tl.cumsum(listed, 0) - 1, place.to(tl.int16), mask=listed > 0)
    tl.store(sizes + own, tl.sum(listed))


@triton.jit
def read_listed(G, near, size, first, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """From the first of a block's listed entries on: values, their places in the block, and which of them exist."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = block.to(tl.int64) * BLOCK
    at = first + tl.arange(0, CHUNK)
    exists = at < size * NEAR
    own = (row * tl.num_programs(0) + block) * (BLOCK // NEAR)
    places = tl.load(near + own + at // NEAR, mask=exists, other=0).to(tl.int32) * NEAR + at % NEAR
    exists = exists & (places < tl.minimum(n - start, BLOCK).to(tl.int32))
    return tl.load(G + row * n + start + places, mask=exists, other=0.0), places, exists


@triton.jit(do_not_specialize=["n"])
def count_listed(G, near, sizes, counts, state, n, LEVEL: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    size = tl.load(sizes + row * tl.num_programs(0) + tl.program_id(0))
    low, shift = tl.load(state + row * 3), tl.load(state + row * 3 + 1)
    first = 0
    while first < size * NEAR:
        values, _, exists = read_listed(G, near, size, first, n, BLOCK, CHUNK)
        above = magnitude_bits(values) - low
        if LEVEL == 1:
            count(counts + row * BINS, above >> shift, exists & (above >= 0))
        else:
            count(counts + row * BINS, above, exists & (above >= 0) & (above < (1 << shift)))
        first += CHUNK


@triton.jit(do_not_specialize=["n"])
def count_kept(G, near, sizes, state, kept, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Of each block: entries above the threshold, and entries that equal it."""
    row = tl.program_id(1).to(tl.int64)
    own = row * tl.num_programs(0) + tl.program_id(0)
    size, threshold = tl.load(sizes + own), tl.load(state + row * 3)
    larger, equal = tl.zeros((CHUNK,), tl.int32), tl.zeros((CHUNK,), tl.int32)
    first = 0
    while first < size * NEAR:
        values, _, exists = read_listed(G, near, size, first, n, BLOCK, CHUNK)
        bits = magnitude_bits(values)
        larger += (exists & (bits > threshold)).to(tl.int32)
        equal += (exists & (bits == threshold)).to(tl.int32)
        first += CHUNK
    tl.store(kept + own * 2, tl.sum(larger))
    tl.store(kept + own * 2 + 1, tl.sum(equal))


@triton.jit(do_not_specialize=["blocks"])
def sum_blocks(kept, blocks, CHUNK: tl.constexpr):
    """Both counts to their sums over the blocks before, in place."""
    row = tl.program_id(0).to(tl.int64)
    larger, equal = 0, 0
    first = 0
    while first < blocks:
        block = first + tl.arange(0, CHUNK)
        at = kept + (row * blocks + block) * 2
        larger_here = tl.load(at, mask=block < blocks, other=0)
        equal_here = tl.load(at + 1, mask=block < blocks, other=0)
        tl.store(at, larger + tl.cumsum(larger_here, 0) - larger_here, mask=block < blocks)
        tl.store(at + 1, equal + tl.cumsum(equal_here, 0) - equal_here, mask=block < blocks)
        larger += tl.sum(larger_here)
        equal += tl.sum(equal_here)
        first += CHUNK


@triton.jit(do_not_specialize=["n", "k"])
def write_kept(G, near, sizes, state, kept, indices, kept_values, n, k, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    block, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    own = row * tl.num_programs(0) + block
    size, threshold, quota = tl.load(sizes + own), tl.load(state + row * 3), tl.load(state + row * 3 + 2)
    larger, equal = tl.load(kept + own * 2), tl.load(kept + own * 2 + 1)
    first = 0
    while first < size * NEAR:
        values, places, exists = read_listed(G, near, size, first, n, BLOCK, CHUNK)
        bits = magnitude_bits(values)
        is_larger, is_equal = (exists & (bits > threshold)).to(tl.int32), (exists & (bits == threshold)).to(tl.int32)
        larger_before = larger + tl.cumsum(is_larger, 0) - is_larger
        equal_before = equal + tl.cumsum(is_equal, 0) - is_equal
        taken = (is_larger > 0) | ((is_equal > 0) & (equal_before < quota))
        at = row * k + larger_before + tl.minimum(equal_before, quota)
        tl.store(indices + at, block * BLOCK + places, mask=taken)
        tl.store(kept_values + at, values, mask=taken)
        larger += tl.sum(is_larger)
        equal += tl.sum(is_equal)
        first += CHUNK
