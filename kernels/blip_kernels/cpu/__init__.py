"""What CPUs compute: products of matrices, packed weights, attention without Triton."""
