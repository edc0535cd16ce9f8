"""Both gradients, `dL` and `sum_b dP_b`, from one forward and one backward.

Every loss that is a function of the samples' log-likelihoods `s_b` has `dL = sum_b w_b ds_b`, and the target's gradient
is `sum_b P_b ds_b`: two weighted sums over the rows of one backward that carries `ds_b` for every sample.
`parameter.py` puts the parameters' uses on the functions of `functions.py`, which form the two sums where a layer has
its inputs at hand; `installed.py` does so for a model. `graph.py` follows the samples from the logits to these layers,
by the rules of `axes.py` (and `masks.py`, for packed samples), and finds what cannot take this path. `row_weights.py`
says how much each row counts. `backward.py` runs the backward, `checked.py` compares it with two, and `targets.py`
brings the target gradients to their parameters.

The rule: an unlearning loss gives the gradients of two plain autograd backwards, or falls back to them, or raises; and
a patched model without an unlearning loss behaves as the unpatched one.
"""
