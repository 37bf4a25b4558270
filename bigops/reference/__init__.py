"""What is right: each op in plain torch, a dozen lines, any dtype, twice differentiable."""
