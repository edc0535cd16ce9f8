"""The unlearning loss: objectives, and what its backward adds to `target_grad` or to a neuron's signal."""
