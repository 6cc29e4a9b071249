// A Mamba2 mixer between its projections (Dao and Gu 2024): causal convolution, selective scan, gated grouped norm.
//
// A token's row of the input is z [inner], xBC [conv_width] and dt [heads], fp16 times in_factor; xBC is x [inner], B
// and C [groups, STATE]. Token i of sequence s lies at row starts[s] + i and at the position of its row. A sequence's slot
// holds `recent`, the raw xBC of the newest TAPS tokens [slot, TAPS, conv_width] fp16 (position p at p % TAPS: a decode
// step writes the one place that none of its reads needs), and `state`, [slot, heads, head_dim, STATE] float32. A
// sequence at position 0 starts from zeros, whatever its slot holds. TAPS: the convolution's length.
#include "mma.cuh"
#include "norm.cuh"

constexpr int THREADS = 128;
constexpr int NORM_THREADS = 512;         // of a block of `gated_norm`, at most
constexpr int LANES = 8;                  // that share a row of the state: four neighbours of every 32 each
constexpr int QUADS = (STATE + 31) / 32;  // float4 of a lane
constexpr int ROWS = STATE > 128 ? 1 : 2;  // of the state of each lane
constexpr int BLOCK_ROWS = THREADS / LANES * ROWS;
constexpr int CHUNK = STATE > 128 ? 8 : 16;  // tokens in shared memory at a time, twice: the next ones arrive meanwhile
constexpr int CONVOLVE_TOKENS = 8;           // of a block of `convolve`

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

struct Convolution {
    const __half* xbc;     // of the flat token axis, row 0
    const __half* recent;  // of the sequence's slot
    const float* weight;   // [TAPS, width], the oldest input's first
    const float* bias;     // [width]
    int stride, width;
    float in_factor;

    // The convolution and SiLU at `channel` of the token in `row`, `index` tokens after its sequence's first one here.
    __device__ __forceinline__ float at(int channel, int row, int index, int position) const {
        float sum = bias[channel];
#pragma unroll
        for (int tap = 0; tap < TAPS; tap++) {
            const int back = TAPS - 1 - tap;
            const __half* from = back <= index ? xbc + (size_t)(row - back) * stride
                                               : recent + (position - back + TAPS) % TAPS * width;
            const float input = back <= position ? __half2float(from[channel]) : 0.0f;
            sum = fmaf(weight[tap * width + channel], input * in_factor, sum);
        }
        return silu(sum);
    }
};

// The sequence that owns a token: the last s with starts[s] <= token.
__device__ __forceinline__ int owner(const int* starts, int sequences, int token) {
    int low = 0, high = sequences;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (starts[middle] <= token) low = middle;
        else high = middle;
    }
    return low;
}

// softplus(dt + dt_bias), and the factor by which a step of that size shrinks the state.
__device__ __forceinline__ float2 step_and_decay(__half dt, float in_factor, float dt_bias, float A) {
    const float x = fmaf(__half2float(dt), in_factor, dt_bias), step = fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
    return make_float2(step, expf(step * A));
}

// 4 bytes to shared memory, asynchronously where the chip can.
__device__ __forceinline__ void copy_float(float* shared, const float* global) {
#if __CUDA_ARCH__ >= 800
    const unsigned address = __cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(address), "l"(global) : "memory");
#else
    *shared = *global;
#endif
}

// grid (T / CONVOLVE_TOKENS, (width + heads) / THREADS, both rounded up), block THREADS: of all tokens, the convolution
// [width], the steps [heads] and the decays [heads], as rows of float32 [T, width + 2 heads].
extern "C" __global__ void __launch_bounds__(THREADS)
    convolve(const __half* projected, const int* __restrict__ starts, const int* __restrict__ positions,
             const int* __restrict__ slots, int sequences, int inner, int width, int heads,
             const float* __restrict__ weight, const float* __restrict__ bias, const float* __restrict__ A,
             const float* __restrict__ dt_bias, const __half* recent, float in_factor,
             float* __restrict__ convolved) {
    dependents_may_start();
    wait_for_predecessor();
    const int stride = inner + width + heads, channel = blockIdx.y * THREADS + threadIdx.x;
    const int first = blockIdx.x * CONVOLVE_TOKENS, last = min(first + CONVOLVE_TOKENS, starts[sequences]);
    if (first >= last || channel >= width + heads) return;
    int sequence = owner(starts, sequences, first);
#pragma unroll 1
    for (int token = first; token < last; token++) {
        while (token >= starts[sequence + 1]) sequence++;
        float* row = convolved + (size_t)token * (width + 2 * heads);
        if (channel < width) {
            const Convolution convolution{projected + inner, recent + (size_t)slots[sequence] * TAPS * width, weight,
                                          bias, stride, width, in_factor};
            row[channel] = convolution.at(channel, token, token - starts[sequence], positions[token]);
        } else {
            const int head = channel - width;
            const float2 step = step_and_decay(projected[(size_t)token * stride + inner + channel], in_factor,
                                               dt_bias[head], A[head]);
            row[channel] = step.x, row[channel + heads] = step.y;
        }
    }
}

// Adds each of LANES values over the LANES lanes that share a row: lane l returns the sum of value l. In the order of
// `sum_over_lanes`, to the last bit.
__device__ __forceinline__ float sum_each_over_lanes(float (&values)[LANES], int lane) {
#pragma unroll
    for (int half = LANES / 2; half; half /= 2)
#pragma unroll
        for (int k = 0; k < half; k++) {
            const float mine = lane & half ? values[k + half] : values[k];
            values[k] = mine + __shfl_xor_sync(~0u, lane & half ? values[k] : values[k + half], half);
        }
    return values[0];
}

__device__ __forceinline__ float sum_over_lanes(float value) {
#pragma unroll
    for (int offset = LANES / 2; offset; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
}

struct Scan {
    const __half* projected;  // [T, inner + width + heads]
    const float* convolved;   // what `convolve` made; unused where a step computes it
    const int* starts;
    const int* positions;
    const int* slots;
    int heads, head_dim, groups, group_heads;
    const float* weight;
    const float* bias;
    const float* A;
    const float* D;
    const float* dt_bias;
    float in_factor;
    __half* recent;
    float* state;
    float* out;  // [T, inner]: y + D x
};

// grid (row blocks, heads, S), block THREADS: the scan over a sequence's new tokens, the state in registers. A block
// owns BLOCK_ROWS rows of one head. ONE: every sequence has one new token, and each block convolves what it needs.
// Writes y and the slot: its rows of the state, x of its rows, and B and C if it is its group's first. Nothing is read
// ahead of the predecessor: reading the state so, although a step before has written it, ended in NaN on an H100.
template <bool ONE> __device__ __forceinline__ void scan(const Scan& p) {
    constexpr int TOKENS = ONE ? 1 : CHUNK, BUFFERS = ONE ? 1 : 2, GROUP = LANES / ROWS;
    __shared__ __align__(16) float B[BUFFERS][TOKENS][QUADS * 32], C[BUFFERS][TOKENS][QUADS * 32];
    __shared__ float x[BUFFERS][TOKENS][BLOCK_ROWS], steps[BUFFERS][TOKENS], decays[BUFFERS][TOKENS];
    dependents_may_start();
    wait_for_predecessor();
    const int inner = p.heads * p.head_dim, width = inner + 2 * p.groups * STATE, stride = inner + width + p.heads;
    const int first_row = blockIdx.x * BLOCK_ROWS, head = blockIdx.y, sequence = blockIdx.z;
    const int rows = min(BLOCK_ROWS, p.head_dim - first_row), group = head / p.group_heads;
    const int first = p.starts[sequence], count = ONE ? 1 : p.starts[sequence + 1] - first;
    if (count <= 0) return;
    const int slot = p.slots[sequence], position = p.positions[first];
    const int lane = threadIdx.x % LANES, my_row = threadIdx.x / LANES * ROWS;

    float s[ROWS][QUADS][4];
    float* my_state = p.state + (((size_t)slot * p.heads + head) * p.head_dim + first_row + my_row) * STATE + 4 * lane;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const float* from = my_state + r * STATE + 32 * q;
            const int left = position > 0 && my_row + r < rows ? STATE - 32 * q - 4 * lane : 0;
            if (STATE % 4 == 0) {
                const float4 v = left > 0 ? *reinterpret_cast<const float4*>(from) : make_float4(0, 0, 0, 0);
                s[r][q][0] = v.x, s[r][q][1] = v.y, s[r][q][2] = v.z, s[r][q][3] = v.w;
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) s[r][q][i] = i < left ? from[i] : 0.0f;
            }
        }
    if (STATE % 32)
#pragma unroll 1
        for (int i = threadIdx.x; i < BUFFERS * TOKENS; i += THREADS)
            for (int n = STATE; n < QUADS * 32; n++) B[i / TOKENS][i % TOKENS][n] = C[i / TOKENS][i % TOKENS][n] = 0;

    const int x_channel = head * p.head_dim + first_row, b_channel = inner + group * STATE,
              c_channel = b_channel + p.groups * STATE;
    __half* my_recent = p.recent + (size_t)slot * TAPS * width;
    auto fetch = [&](int begin) {
        const int tokens = min(TOKENS, count - begin), to = begin / TOKENS % BUFFERS;
        const int row_size = width + 2 * p.heads;
        const float* row = p.convolved + (size_t)(first + begin) * row_size;
#pragma unroll 2
        for (int i = threadIdx.x; i < tokens * STATE; i += THREADS) {
            const int t = i / STATE, n = i % STATE;
            copy_float(&B[to][t][n], row + (size_t)t * row_size + b_channel + n);
            copy_float(&C[to][t][n], row + (size_t)t * row_size + c_channel + n);
        }
#pragma unroll 1
        for (int i = threadIdx.x; i < tokens * BLOCK_ROWS; i += THREADS) {
            const int t = i / BLOCK_ROWS, r = i % BLOCK_ROWS;
            if (r < rows) copy_float(&x[to][t][r], row + (size_t)t * row_size + x_channel + r);
        }
        if (threadIdx.x < tokens) {
            const float* step = row + (size_t)threadIdx.x * row_size + width + head;
            copy_float(&steps[to][threadIdx.x], step);
            copy_float(&decays[to][threadIdx.x], step + p.heads);
        }
        copy_commit();
    };
    if (!ONE) {
        fetch(0);
    } else {  // all loads before the first store, so that they are on their way together
        const Convolution convolution{p.projected + inner, my_recent, p.weight, p.bias, stride, width, p.in_factor};
        const int r = min((int)threadIdx.x, rows - 1);
        const float2 step = step_and_decay(p.projected[(size_t)first * stride + inner + width + head], p.in_factor,
                                           p.dt_bias[head], p.A[head]);
        const float own = convolution.at(x_channel + r, first, 0, position);
#pragma unroll
        for (int base = 0; base < STATE; base += THREADS) {
            const int n = min(base + (int)threadIdx.x, STATE - 1);
            const float b = convolution.at(b_channel + n, first, 0, position);
            const float c = convolution.at(c_channel + n, first, 0, position);
            if (base + threadIdx.x < STATE) B[0][0][n] = b, C[0][0][n] = c;
        }
        if (threadIdx.x < rows) x[0][0][r] = own;
        if (threadIdx.x == 0) steps[0][0] = step.x, decays[0][0] = step.y;
    }
    const float skip = p.D[head];
    // One token: the state moves on, and this lane's share of y.
    auto advance = [&](int at, int t, float (&y)[ROWS]) {
        const float step = steps[at][t], decay = decays[at][t];
        float input[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) input[r] = step * x[at][t][my_row + r], y[r] = 0;
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const float4 b4 = *reinterpret_cast<const float4*>(&B[at][t][32 * q + 4 * lane]);
            const float4 c4 = *reinterpret_cast<const float4*>(&C[at][t][32 * q + 4 * lane]);
            const float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    s[r][q][i] = fmaf(s[r][q][i], decay, input[r] * b[i]);
                    y[r] = fmaf(s[r][q][i], c[i], y[r]);
                }
        }
    };
    auto store = [&](int at, int t, int begin, int r, float y) {
        if (my_row + r < rows)
            p.out[(size_t)(first + begin + t) * inner + x_channel + my_row + r] =
                fmaf(skip, x[at][t][my_row + r], y);
    };
    for (int begin = 0; begin < count; begin += TOKENS) {
        const int tokens = min(TOKENS, count - begin), at = begin / TOKENS % BUFFERS;
        copy_wait<0>();
        __syncthreads();
        if (begin + TOKENS < count) fetch(begin + TOKENS);
        int t = 0;
        for (; t + GROUP <= tokens; t += GROUP) {  // as many as one reduction serves
            float shares[LANES];
#pragma unroll
            for (int j = 0; j < GROUP; j++) {
                float y[ROWS];
                advance(at, t + j, y);
#pragma unroll
                for (int r = 0; r < ROWS; r++) shares[j * ROWS + r] = y[r];
            }
            const float y = sum_each_over_lanes(shares, lane);
            store(at, t + lane / ROWS, begin, lane % ROWS, y);
        }
        for (; t < tokens; t++) {
            float y[ROWS];
            advance(at, t, y);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                y[r] = sum_over_lanes(y[r]);
                if (lane == r) store(at, t, begin, r, y[r]);
            }
        }
    }

#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            float* to = my_state + r * STATE + 32 * q;
            const int left = my_row + r < rows ? STATE - 32 * q - 4 * lane : 0;
            if (STATE % 4 == 0) {
                if (left > 0)
                    *reinterpret_cast<float4*>(to) =
                        make_float4(s[r][q][0], s[r][q][1], s[r][q][2], s[r][q][3]);
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (i < left) to[i] = s[r][q][i];
            }
        }
    auto remember = [&](int channel) {
#pragma unroll 1
        for (int i = max(0, count - TAPS); i < count; i++)
            my_recent[(position + i) % TAPS * width + channel] =
                p.projected[(size_t)(first + i) * stride + inner + channel];
    };
#pragma unroll 1
    for (int r = threadIdx.x; r < rows; r += THREADS) remember(x_channel + r);
    if (head == group * p.group_heads && first_row == 0)
#pragma unroll 1
        for (int n = threadIdx.x; n < STATE; n += THREADS) remember(b_channel + n), remember(c_channel + n);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    scan_one(const __half* projected, const float* convolved, const int* __restrict__ starts,
             const int* __restrict__ positions, const int* __restrict__ slots, int heads, int head_dim, int groups,
             int group_heads, const float* __restrict__ weight, const float* __restrict__ bias,
             const float* __restrict__ A, const float* __restrict__ D, const float* __restrict__ dt_bias,
             float in_factor, __half* recent, float* state, float* __restrict__ out) {
    scan<true>({projected, convolved, starts, positions, slots, heads, head_dim, groups, group_heads, weight, bias, A,
                D, dt_bias, in_factor, recent, state, out});
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
    scan_many(const __half* projected, const float* convolved,
              const int* __restrict__ starts, const int* __restrict__ positions, const int* __restrict__ slots,
              int heads, int head_dim, int groups, int group_heads, const float* __restrict__ weight,
              const float* __restrict__ bias, const float* __restrict__ A, const float* __restrict__ D,
              const float* __restrict__ dt_bias, float in_factor, __half* recent, float* state,
              float* __restrict__ out) {
    scan<false>({projected, convolved, starts, positions, slots, heads, head_dim, groups, group_heads, weight, bias, A,
                 D, dt_bias, in_factor, recent, state, out});
}

// grid (T, groups), block of whole warps, up to NORM_THREADS: RMSNorm over `size` neighbours of y * silu(z), to fp16
// times a power of two. z is the first of a row of `projected`, of `stride`. A token that no sequence owns gives zeros.
// What a thread has read last it still holds when the sum is there: of a group of four numbers per thread, all.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    gated_norm(const float* y, const __half* projected, int stride, float in_factor,
               const int* __restrict__ starts, int sequences, int size, const float* __restrict__ weight, float eps,
               float factor, __half* __restrict__ out) {
    __shared__ float partial[NORM_THREADS / 32];
    const size_t from = ((size_t)blockIdx.x * gridDim.y + blockIdx.y) * size;
    const int quads = size % 4 || stride % 4 ? 0 : size / 4;  // others are not aligned to 16 and 8 bytes
    const int threads = blockDim.x, lane = threadIdx.x % 32;
    const __half* z = projected + (size_t)blockIdx.x * stride + (size_t)blockIdx.y * size;
    y += from, out += from, weight += (size_t)blockIdx.y * size;
    dependents_may_start();
    if (threadIdx.x < quads) prefetch(weight + 4 * threadIdx.x);
    wait_for_predecessor();

    auto gate = [&](__half2 pair) {
        const float2 g = __half22float2(pair);
        return make_float2(silu(g.x * in_factor), silu(g.y * in_factor));
    };
    float4 v, w;
    auto load = [&](int i) {
        const uint2 gates = reinterpret_cast<const uint2*>(z)[i];
        v = reinterpret_cast<const float4*>(y)[i], w = reinterpret_cast<const float4*>(weight)[i];
        const float2 low = gate(as_half2(gates.x)), high = gate(as_half2(gates.y));
        v = make_float4(v.x * low.x, v.y * low.y, v.z * high.x, v.w * high.y);
    };
    auto gated = [&](int i) { return y[i] * silu(__half2float(z[i]) * in_factor); };
    const bool owned = blockIdx.x < starts[sequences];
    float squares = 0;
    int i = threadIdx.x;
#pragma unroll 1
    for (; i < quads; i += threads) {
        load(i);
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
#pragma unroll 1
    for (int k = 4 * quads + threadIdx.x; k < size; k += threads) squares = fmaf(gated(k), gated(k), squares);
    squares = warp_sum(squares);
    if (lane == 0) partial[threadIdx.x / 32] = squares;
    __syncthreads();
    const float total = warp_sum(lane < threads / 32 ? partial[lane] : 0.0f);
    const float scale = factor * rsqrtf(__fdividef(total, size) + eps);
#pragma unroll 1
    for (i -= threads; i >= 0;) {
        reinterpret_cast<uint2*>(out)[i] = owned ? normed(v, scale, w) : make_uint2(0, 0);
        i -= threads;
        if (i >= 0) load(i);
    }
#pragma unroll 1
    for (int k = 4 * quads + threadIdx.x; k < size; k += threads)
        out[k] = __float2half_rn(owned ? gated(k) * scale * weight[k] : 0.0f);
}
