"""The kernels under a Hugging Face model: `patch` puts them there, its handle uses them and takes them away."""
