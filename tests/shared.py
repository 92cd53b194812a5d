"""Lists the files whose tests apply to every backend, also interpreted and on CUDA tensors."""

CONTRACT = "autograd", "fuzz", "options", "values"
KERNELS = "arithmetic", "backends"
OPS = (
    *("activation", "cross_entropy", "distillation", "embedding_loss", "linear_cross_entropy"),
    *("log_probs", "pointwise_loss", "softmax", "targets"),
)
FOLDERS = {"contract": CONTRACT, "formula": ("formula",), "kernels": KERNELS, "ops": OPS}
SHARED = tuple(f"{folder}/test_{name}.py" for folder in FOLDERS for name in FOLDERS[folder])
