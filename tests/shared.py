"""Lists the files whose tests apply to every backend, also interpreted and on CUDA tensors."""

SHARED = (
    "test_activation.py",
    "test_arithmetic.py",
    "test_contract.py",
    "test_contract_autograd.py",
    "test_backends.py",
    "test_class_losses.py",
    "test_embedding_loss.py",
    "test_cross_entropy.py",
    "test_cross_entropy_options.py",
    "test_distillation.py",
    "test_formula.py",
    "test_fuzz.py",
    "test_gated.py",
    "test_inplace.py",
    "test_linear_cross_entropy.py",
    "test_log_probs.py",
    "test_metrics.py",
    "test_pointwise_loss.py",
    "test_softmax.py",
    "test_totals.py",
)
