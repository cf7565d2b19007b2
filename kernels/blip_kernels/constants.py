"""Numbers that ops, their eager twins and their kernels must agree on."""

NO_ID = -100  # id of an empty queue slot: equal to nothing, not even to itself
DROPOUT_STEPS = 1 << 16  # dropout's probability is a multiple of 1 / DROPOUT_STEPS: 16 random bits per weight
