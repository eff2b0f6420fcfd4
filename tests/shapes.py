"""What makes a model one of a kind; the sizes of a tiny one are each test's own."""

LLAMA = {
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
}
