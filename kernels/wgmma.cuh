// Warpgroup matrix instructions, barriers in shared memory and bulk copies: what sm_90a alone has (PTX ISA 8.0).

// -- Barriers and copies ------------------------------------------------------------------------------------------

__device__ __forceinline__ unsigned shared_address(const void* p) { return __cvta_generic_to_shared(p); }

// A barrier in shared memory: a phase ends when `arrivals` have come and all bytes that were announced. The phases'
// parities alternate, beginning with 0.
__device__ __forceinline__ void mbarrier_init(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void mbarrier_publish() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_expect(unsigned barrier, int bytes) {  // and arrives
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
// Arrives once what this thread has asked for with copy_async is there.
__device__ __forceinline__ void mbarrier_arrive_copied(unsigned barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(unsigned barrier, int parity) {
    asm volatile("{\n.reg .pred done;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
                 :: "r"(barrier), "r"(parity) : "memory");
}

// Global to shared, a multiple of 16 bytes; both addresses are multiples of 16.
__device__ __forceinline__ void bulk_copy(unsigned shared, const void* global, int bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared), "l"(global), "r"(bytes), "r"(barrier) : "memory");
}

// Adds to four floats without waiting for what they were; one addition to each is the same in any order.
__device__ __forceinline__ void add_four(float* to, float a, float b, float c, float d) {
    asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" :: "l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// -- Clusters -----------------------------------------------------------------------------------------------------

// Every block's threads have come, those that ended aside, and see what all wrote.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Four floats at the same shared address in the cluster's block `rank`.
__device__ __forceinline__ float4 cluster_load(unsigned shared, int rank) {
    float4 v;
    unsigned remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(remote) : "memory");
    return v;
}

// threadIdx.x, read anew: what is computed from it cannot be computed earlier.
__device__ __forceinline__ int thread_index() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// Registers of each thread of a warpgroup from here on: the whole block's must fit what it was launched with.
template <int COUNT> __device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT));
}

// -- Matrix products ----------------------------------------------------------------------------------------------

// Describes B in shared memory: columns of 64 consecutive halves of k, 128 bytes each; 16-byte chunk c of column n lies
// at c ^ (n % 8); 8 columns are 1024 bytes, and so is the alignment. A step of 16 along k is two units further.
__device__ __forceinline__ unsigned long long swizzled_columns(unsigned address) {
    return (1ull << 62) | (64ull << 32) | (1ull << 16) | (address >> 4);
}

// Registers that others have written may be read by the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}
// Keeps the compiler from reading sums before the wait that stands in front of this.
template <int COUNT> __device__ __forceinline__ void wgmma_settled(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}

// D = A * B + D (or A * B, unless `accumulate`) for 64 rows, 16 of k and N columns: wgmma.m64nNk16. Warp w of the
// warpgroup has rows 16w to 16w+15; a and d[4i..4i+3] are fragments as in mma.cuh, d of columns 8i to 8i+7.
template <int N>
__device__ void wgmma(float (&d)[N / 2], const unsigned (&a)[4], unsigned long long b, bool accumulate);

#define REGISTERS_8(i)                                                                                                 \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])
#define REGISTERS_16(i) REGISTERS_8(i), REGISTERS_8(i + 8)
#define REGISTERS_32(i) REGISTERS_16(i), REGISTERS_16(i + 16)
#define REGISTERS_64(i) REGISTERS_32(i), REGISTERS_32(i + 32)
#define OPERANDS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define OPERANDS_16 OPERANDS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define OPERANDS_32 OPERANDS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define OPERANDS_64 OPERANDS_32                                                                                        \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"                                                 \
    ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA(N, D, A0, A1, A2, A3, B, ACCUMULATE)                                                                     \
    template <>                                                                                                        \
    __device__ __forceinline__ void wgmma<N>(float (&d)[D], const unsigned (&a)[4], unsigned long long b, bool acc) {  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ACCUMULATE ", 0;\n"                                         \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" OPERANDS_##D "}, "                     \
                     "{%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1, 0;\n}"                                  \
                     : REGISTERS_##D(0)                                                                                \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)acc));                             \
    }
WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
#undef WGMMA
