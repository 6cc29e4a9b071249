// What the blocks of a cluster (sm_90) bring each other: they store to each other's shared memory, and each has a
// barrier that counts the bytes that came. So nothing waits for memory at large, as a cluster's own barriers would.
__device__ __forceinline__ void inbox_open(unsigned long long* barrier) {  // by all threads
    if (threadIdx.x == 0)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;"
            :: "r"((unsigned)__cvta_generic_to_shared(barrier)) : "memory");
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void inbox_expect(unsigned long long* barrier, int bytes) {  // by one thread
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
        :: "r"((unsigned)__cvta_generic_to_shared(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void inboxes_wait_open() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
__device__ __forceinline__ unsigned in_block(const void* p, int rank) {
    unsigned address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"((unsigned)__cvta_generic_to_shared(p)), "r"(rank));
    return address;
}
__device__ __forceinline__ void inbox_store(const float4* to, unsigned long long* barrier, int rank, float4 x) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
        :: "r"(in_block(to, rank)), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(in_block(barrier, rank)) : "memory");
}
__device__ __forceinline__ void inbox_store(const float2* to, unsigned long long* barrier, int rank, float2 x) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
        :: "r"(in_block(to, rank)), "f"(x.x), "f"(x.y), "r"(in_block(barrier, rank)) : "memory");
}
__device__ __forceinline__ void inbox_wait(unsigned long long* barrier) {
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n\t@!done bra again;\n\t}"
        :: "r"((unsigned)__cvta_generic_to_shared(barrier)) : "memory");
}
