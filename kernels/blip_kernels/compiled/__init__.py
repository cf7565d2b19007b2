"""What compilers make of the kernels, for GPUs that need not be here: code, registers, budgets, configurations."""
