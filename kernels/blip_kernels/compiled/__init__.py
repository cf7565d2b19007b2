"""The kernels compiled for GPUs that need not be present: code, registers, budgets, configurations."""
