// What may stand behind a linear: the activations of fp4rt/ops/__init__.py, on float32.

enum ActivationKind { NONE = 0, RELU2 = 1, SILU = 2, GELU_TANH = 3, SWIGLU_OAI = 4 };  // from SILU on: gated

__device__ __forceinline__ bool is_gated(int kind) { return kind >= SILU; }

// The gated ones are gate * sigmoid(slope) * up. Exponentials and reciprocals too small for a float count as zero.
__device__ __forceinline__ float sigmoid_product(float gate, float slope, float up) {
    float power, sigmoid;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(slope * -1.4426950409f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.0f + power));
    return gate * sigmoid * up;
}
// The slope is gate * (linear + cubic * gate^2): GELU's tanh form is x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)).
struct Slope { float linear, cubic; };
__device__ __forceinline__ Slope slope_of(int kind) {
    return {kind == GELU_TANH ? 1.5957691216f : 1.0f, kind == GELU_TANH ? 0.0713548163f : 0.0f};
}
__device__ __forceinline__ float smooth_product(float gate, float up, const Slope& slope) {
    return sigmoid_product(gate, gate * (slope.linear + slope.cubic * gate * gate), up);
}
__device__ __forceinline__ float gated_product(float gate, float up, int kind) {
    if (kind != SWIGLU_OAI) return smooth_product(gate, up, slope_of(kind));
    gate = gate > 7.0f ? 7.0f : gate;  // not fminf, which loses a NaN
    up = (up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up) + 1.0f;
    return sigmoid_product(gate, 1.702f * gate, up);
}

__device__ __forceinline__ float relu2(float x) { return x < 0.0f ? 0.0f : x * x; }
