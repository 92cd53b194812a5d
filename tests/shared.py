"""Lists the files whose tests apply to every backend, also interpreted and on CUDA tensors."""

SHARED = (
    "contract/test_autograd.py",
    "contract/test_fuzz.py",
    "contract/test_options.py",
    "contract/test_values.py",
    "formula/test_formula.py",
    "kernels/test_arithmetic.py",
    "kernels/test_backends.py",
    "kernels/test_totals.py",
    "ops/test_activation.py",
    "ops/test_cross_entropy.py",
    "ops/test_distillation.py",
    "ops/test_embedding_loss.py",
    "ops/test_linear_cross_entropy.py",
    "ops/test_log_probs.py",
    "ops/test_pointwise_loss.py",
    "ops/test_softmax.py",
)
