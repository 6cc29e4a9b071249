// The next token of each row, as fp4rt/sampling.py defines it.
//
// Every sum that decides is over integers and every maximum breaks ties to the lowest id, so the order in
// which threads arrive changes nothing. Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1,
// 2, 3", 2011.
#include "vocabulary.cuh"

constexpr int SLICE = 8 * THREADS;      // ids of one block
constexpr int BINS = 1024;  // of 1/64 of a logit each, below the largest: a threshold's first digit
constexpr int CAPACITY = 3072;          // numbers of one bin that are looked at in shared memory
constexpr int IN_PROMPT = 1 << 30;      // in counts, beside how often an id was generated
typedef unsigned long long Weight;      // 1, or a probability over the largest one in units of 2^-40

struct Row {  // as fp4rt/ops/cuda/sample.py lays it out
    double top_p, log_min_p;            // 1 and -inf: off
    int* counts;                        // [V] or null
    const unsigned* allowed;            // [ceil(V / 32)], a bit for each id, or null: all are
    const uint2* biased;                // [ceil(V / 32)] or null: such bits, and how many are set before these
    const float* biases;                // of the ids whose bit is set
    float temperature, repetition, presence, frequency;
    int top_k;                          // less than may be drawn; 0: off
    unsigned seed_low, seed_high, step;
};

struct Slice {
    Best best;
    int finite;
};

// A row's logits under penalties, biases, mask and temperature. Each operation rounds once, as numpy's float32 does.
struct Values {
    const float* logits;
    Row row;
    const Row* there;  // for what few rows have: registers are scarce
    bool changed;      // there is a bias or a mask

    __device__ __forceinline__ float operator()(int id, float logit) const {
        if (row.counts) {
            const int count = row.counts[id];
            if (count)
                logit = logit > 0 ? __fdiv_rn(logit, row.repetition) : __fmul_rn(logit, row.repetition);
            const int generated = count & (IN_PROMPT - 1);
            if (generated)
                logit = __fsub_rn(__fsub_rn(logit, row.presence), __fmul_rn(row.frequency, (float)generated));
        }
        if (changed) {
            const unsigned bit = 1u << (id & 31);
            if (there->biased) {
                const uint2 word = there->biased[id >> 5];
                if (word.x & bit) logit = __fadd_rn(logit, there->biases[word.y + __popc(word.x & (bit - 1))]);
            }
            if (there->allowed && !(there->allowed[id >> 5] & bit)) return -infinity();  // below every threshold
        }
        return (row.temperature > 0 ? __fdiv_rn(logit, row.temperature) : logit) + 0.0f;  // never minus zero
    }
    // visit(id, value) for every id, by all threads of a block.
    template <class Visit> __device__ __forceinline__ void each(int vocabulary, Visit visit) const {
        each_logit(logits, vocabulary, [&](int id, float logit) { visit(id, (*this)(id, logit)); });
    }
};

// Random words of ids 4 * block to 4 * block + 3.
__device__ __forceinline__ uint4 philox(const Row& row, unsigned block) {
    unsigned c0 = row.step, c1 = block, c2 = 0, c3 = 0, k0 = row.seed_low, k1 = row.seed_high;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        const unsigned high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

// -log(-log(u)), u = ((x >> 8) + 0.5) * 2^-24. Above one half u itself would not fit float32; 1 - u does.
__device__ __forceinline__ float gumbel(unsigned x) {
    x >>= 8;
    const float minus_log = x < 1u << 23 ? -logf(((float)x + 0.5f) * 0x1p-24f)
                                         : -log1pf(-((float)((1u << 24) - 1 - x) + 0.5f) * 0x1p-24f);
    return -logf(minus_log);
}

constexpr int PARTS = 4, PART_BITS = 10;  // of a Weight: only 32-bit additions are native in shared memory

struct Selection {
    unsigned parts[PARTS][BINS];
    Weight histogram[BINS];
    float list[CAPACITY];
    Weight beyond, target;
    int bin, count;
    unsigned key;
};

// The three steps of a histogram over the block: clear its n bins, add, and sum the parts up.
__device__ __forceinline__ void clear(Selection& s, int n) {
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS)
#pragma unroll
        for (int part = 0; part < PARTS; part++) s.parts[part][i] = 0;
    __syncthreads();
}
__device__ __forceinline__ void add(Selection& s, int bin, Weight weight) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const unsigned bits = part < PARTS - 1 ? weight & ((1 << PART_BITS) - 1) : weight;
        if (bits) atomicAdd(&s.parts[part][bin], bits);
        weight >>= PART_BITS;
    }
}
__device__ __forceinline__ void sum_up(Selection& s, int n) {
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) {
        Weight sum = 0;
#pragma unroll
        for (int part = 0; part < PARTS; part++) sum += (Weight)s.parts[part][i] << (part * PART_BITS);
        s.histogram[i] = sum;
    }
    __syncthreads();
}

// Larger floats have larger keys.
__device__ __forceinline__ unsigned key_of(float z) {
    const unsigned bits = __float_as_uint(z);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// One warp: the first of n bins (the last, if descending) at which the sum reaches `target`; that sum without
// the bin is taken from `target`. n if no bin does. n is a multiple of 32.
__device__ int crossing(const Weight* histogram, int n, bool descending, Weight& target) {
    const int lane = threadIdx.x % 32, per_lane = n / 32;
    auto bin = [&](int i) { return descending ? n - 1 - i : i; };
    Weight mine = 0;
    for (int i = 0; i < per_lane; i++) mine += histogram[bin(lane * per_lane + i)];
    Weight sum = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const Weight other = __shfl_up_sync(~0u, sum, offset);
        if (lane >= offset) sum += other;
    }
    const unsigned reached = __ballot_sync(~0u, sum >= target);
    int found = n;
    Weight left = target - __shfl_sync(~0u, sum, 31);
    if (reached) {
        const int owner = __ffs(reached) - 1;
        left = target - (sum - mine);
        if (lane == owner) {
            int i = 0;
            for (Weight w; (w = histogram[bin(lane * per_lane + i)]) < left; i++) left -= w;
            found = bin(lane * per_lane + i);
        }
        found = __shfl_sync(~0u, found, owner), left = __shfl_sync(~0u, left, owner);
    }
    target = left;
    return found;
}

// The smallest value that stays, of those from `floor` up: by mass, values stay while the mass of all larger
// ones is below `share` of the mass; otherwise until `share` of them are there. First by bins, then by the
// bits of one bin's values.
__device__ __forceinline__ float select(const Values& values, int vocabulary, float largest, float floor,
                                        bool by_mass, double share, Selection& s) {
    auto weight = [&](float z) {
        return by_mass ? (Weight)__float2ll_rn(expf(z - largest) * 0x1p40f) : (Weight)1;
    };
    auto bin_of = [&](float z) { return min((int)((largest - z) * values.row.temperature * 64), BINS); };
    clear(s, BINS);
    if (threadIdx.x == 0) s.beyond = 0, s.count = 0, s.key = 0;
    __syncthreads();
    Weight beyond = 0;
    values.each(vocabulary, [&](int, float z) {
        if (z < floor) return;
        const int bin = bin_of(z);
        if (bin < BINS) add(s, bin, weight(z));
        else beyond += weight(z);
    });
#pragma unroll
    for (int offset = 16; offset; offset /= 2) beyond += __shfl_xor_sync(~0u, beyond, offset);
    if (threadIdx.x % 32 == 0 && beyond) atomicAdd(&s.beyond, beyond);
    sum_up(s, BINS);
    if (threadIdx.x < 32) {
        Weight target = (Weight)share;
        if (by_mass) {
            Weight total = 0;
            for (int i = threadIdx.x; i < BINS; i += 32) total += s.histogram[i];
#pragma unroll
            for (int offset = 16; offset; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
            target = max((Weight)ceil(share * (double)(total + s.beyond)), (Weight)1);
        }
        const int bin = crossing(s.histogram, BINS, false, target);
        if (threadIdx.x == 0) s.bin = bin, s.target = target;
    }
    __syncthreads();
    const int bin = s.bin;
    values.each(vocabulary, [&](int, float z) {
        if (z < floor || bin_of(z) != bin) return;
        const int place = atomicAdd(&s.count, 1);
        if (place < CAPACITY) s.list[place] = z;
    });
    __syncthreads();
    const int count = s.count;
    const bool listed = count <= CAPACITY;
    for (int shift = 24; shift >= 0; shift -= 8) {
        clear(s, 256);
        const unsigned above = s.key;
        auto count_digit = [&](float z) {
            const unsigned key = key_of(z);
            if ((unsigned long long)(key ^ above) >> (shift + 8) == 0) add(s, key >> shift & 255, weight(z));
        };
        if (listed)
            for (int i = threadIdx.x; i < count; i += THREADS) count_digit(s.list[i]);
        else
            values.each(vocabulary, [&](int, float z) {
                if (z >= floor && bin_of(z) == bin) count_digit(z);
            });
        sum_up(s, 256);
        if (threadIdx.x < 32) {
            Weight target = s.target;
            const int digit = crossing(s.histogram, 256, true, target);
            if (threadIdx.x == 0) s.key |= (unsigned)digit << shift, s.target = target;
        }
        __syncthreads();
    }
    const unsigned key = s.key;
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// grid (slices of SLICE ids, R), block THREADS. Rows that are greedy or unfiltered are done in one pass; for
// the others the block that arrives last finds the thresholds and draws. slices [R, gridDim.x] is room;
// tickets [R] is zero before and after. Advances each row's step and counts.
extern "C" __global__ void __launch_bounds__(THREADS)
    sample(const float* __restrict__ logits, Row* rows, Slice* slices, int* tickets, int* __restrict__ ids,
           int vocabulary) {
    __shared__ Selection selection;
    __shared__ int last;
    const int r = blockIdx.y, first = blockIdx.x * SLICE;
    const Values values{logits + (size_t)r * vocabulary, rows[r], rows + r,
                        rows[r].biased || rows[r].allowed};
    const Row& row = values.row;
    const bool random = row.temperature > 0, top_k = row.top_k > 0, top_p = row.top_p < 1;
    const bool filtered = random && (top_k || top_p || row.log_min_p > -INFINITE);

    Best best{-INFINITE, -1};
    bool finite = true;
#pragma unroll 1  // 64 registers are all that a block of this size leaves
    for (int i = 0; i < SLICE / THREADS / 4; i++) {
        const int id = first + 4 * (i * THREADS + threadIdx.x);
        float x[4] = {};
        if (id + 3 < vocabulary && vocabulary % 4 == 0) {
            const float4 v = *reinterpret_cast<const float4*>(values.logits + id);
            x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (id + j < vocabulary) x[j] = values.logits[id + j];
        }
        uint4 words = make_uint4(0, 0, 0, 0);
        if (random && !filtered && id < vocabulary) words = philox(row, id / 4);
        const unsigned bits[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            finite = finite && fabsf(x[j]) <= INFINITE;
            if (id + j >= vocabulary) continue;
            float score = values(id + j, x[j]);
            if (random && !filtered) score += gumbel(bits[j]);
            best = better(best, Best{score, id + j});
        }
    }
    best = block_best(best);
    finite = __syncthreads_and(finite);
    if (threadIdx.x == 0) {
        slices[(size_t)r * gridDim.x + blockIdx.x] = Slice{best, finite};
        __threadfence();
        last = atomicAdd(&tickets[r], 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();

    best = Best{-INFINITE, -1};
    finite = true;
    for (int i = threadIdx.x; i < gridDim.x; i += THREADS) {
        const volatile Slice& slice = slices[(size_t)r * gridDim.x + i];
        best = better(best, Best{slice.best.score, slice.best.id});
        finite = finite && slice.finite;
    }
    best = block_best(best);
    finite = __syncthreads_and(finite);
    if (finite && filtered) {
        const float largest = best.score;
        float floor = -INFINITE;
#pragma unroll 1  // one copy of the code
        for (int by_mass = 0; by_mass < 2; by_mass++)
            if (by_mass ? top_p : top_k)
                floor = select(values, vocabulary, largest, floor, by_mass, by_mass ? row.top_p : row.top_k,
                               selection);
        best = Best{-INFINITE, -1};
        values.each(vocabulary, [&](int id, float z) {
            if (z < floor || (double)z - (double)largest < row.log_min_p) return;
            const uint4 words = philox(row, id / 4);
            best = better(best, Best{z + gumbel(id % 4 < 2 ? (id % 2 ? words.y : words.x)
                                                           : (id % 2 ? words.w : words.z)),
                                     id});
        });
        best = block_best(best);
    }
    if (threadIdx.x == 0) {
        const int id = finite ? best.id : -1;
        ids[r] = id;
        rows[r].step++;
        if (id >= 0 && row.counts) row.counts[id]++;
        tickets[r] = 0;
    }
}

// grid and block any: what a sequence has seen. events are ids, minus one minus id for those of the prompt; counts
// [V] are zero before.
extern "C" __global__ void count_tokens(const int* __restrict__ events, int count, int* counts) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        const int event = events[i];
        if (event < 0) atomicOr(&counts[-1 - event], IN_PROMPT);
        else atomicAdd(&counts[event], 1);
    }
}
