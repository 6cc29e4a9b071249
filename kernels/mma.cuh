// Tensor-core and memory primitives that every kernel shares: fp16 operands and fp32 accumulation on all architectures.
#include <cuda_fp16.h>

// D += A * B for a 16x8x16 tile (PTX ISA, mma.m16n8k16). Lane = 4 * g + t holds
//   a[0] = A[g][2t, 2t+1], a[1] = A[g+8][2t, 2t+1], a[2] = A[g][2t+8, 2t+9], a[3] = A[g+8][2t+8, 2t+9],
//   b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g],
//   d[0], d[1] = D[g][2t, 2t+1], d[2], d[3] = D[g+8][2t, 2t+1].
// sm_75 has the 16x8x8 form only: its two halves of k are the same registers.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

__device__ __forceinline__ unsigned as_bits(__half2 x) { return *reinterpret_cast<unsigned*>(&x); }
__device__ __forceinline__ __half2 as_half2(unsigned x) { return *reinterpret_cast<__half2*>(&x); }

// 16 bytes that are read once: they pass by L1, where the activations stay.
__device__ __forceinline__ uint4 load_once(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

#if __CUDA_ARCH__ >= 800
// How L2 should treat what is read once in a step: it goes first, so that the rest stays, the kernels' code too.
__device__ __forceinline__ unsigned long long evict_first() {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
#endif

// load_once of a stream of weights, which leaves L2 first.
__device__ __forceinline__ uint4 load_streamed(const void* p) {
#if __CUDA_ARCH__ >= 800
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p), "l"(evict_first()));
    return v;
#else
    return load_once(p);
#endif
}

// Brings the line of an address to L2.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }

// Global to shared, 16 bytes; `bytes` of them are read (0 or 16) and the rest is zero. Asynchronous where the chip can.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
#if __CUDA_ARCH__ >= 800
    unsigned address = __cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(address), "l"(global), "r"(bytes) : "memory");
#else
    uint4 v = make_uint4(0, 0, 0, 0);
    if (bytes) v = *reinterpret_cast<const uint4*>(global);
    *reinterpret_cast<uint4*>(shared) = v;
#endif
}
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void copy_async(void* shared, const void* global, unsigned long long policy) {
    unsigned address = __cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
        :: "r"(address), "l"(global), "l"(policy) : "memory");
}
#endif
// 16 bytes of a stream of weights, which leaves L2 first.
__device__ __forceinline__ void copy_streamed(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
    copy_async(shared, global, evict_first());
#else
    copy_async(shared, global, 16);
#endif
}
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int PENDING> __device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
#endif
}

// Named barriers (1 to 15) for some of a block's threads; those that arrive go on, those that wait see what all wrote.
__device__ __forceinline__ void barrier_wait(int id, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// Programmatic dependent launch. Every kernel that may be launched with it calls `dependents_may_start` early and
// `wait_for_predecessor` in every thread before it touches memory that another kernel writes or reads. Such memory is
// never `const __restrict__`: the compiler takes that as a promise that nobody writes it, and may read it before the wait.
__device__ __forceinline__ void dependents_may_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
