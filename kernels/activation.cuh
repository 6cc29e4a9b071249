// What may stand behind a linear: the activations of fp4rt/ops/__init__.py, on float32.

enum ActivationKind { NONE = 0, RELU2 = 1, SILU = 2, GELU_TANH = 3, SWIGLU_OAI = 4 };  // from SILU on: gated

__device__ __forceinline__ bool is_gated(int kind) { return kind >= SILU; }

// The gated ones are gate * sigmoid(slope) * up: GELU's tanh form is x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)).
__device__ __forceinline__ float gated_product(float gate, float up, int kind) {
    float slope = gate;
    if (kind == GELU_TANH) slope = gate * (1.5957691216f + 0.0713548163f * gate * gate);
    if (kind == SWIGLU_OAI) {
        gate = gate > 7.0f ? 7.0f : gate;  // not fminf, which loses a NaN
        up = (up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up) + 1.0f;
        slope = 1.702f * gate;
    }
    return gate / (1.0f + __expf(-slope)) * up;
}

__device__ __forceinline__ float relu2(float x) { return x < 0.0f ? 0.0f : x * x; }
