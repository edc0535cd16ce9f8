"""The activation of an MLP, gated (`glu`) or not (`act`), with scores of its neurons."""
