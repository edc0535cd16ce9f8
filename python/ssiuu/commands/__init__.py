"""One file per command: the only place that knows both models and run folders."""
