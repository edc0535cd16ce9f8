"""What the ops share: checks, results, precision, and what their native and Triton kernels are called through."""
