"""Both gradients, `dL` and `sum_b dP_b`, from one forward and one backward.

Every loss that is a function of the samples' log-likelihoods `s_b` has `dL = sum_b w_b ds_b`, and the target's gradient
is `sum_b P_b ds_b`: two weighted sums over the rows of one backward that carries `ds_b` for every sample.
`parameter.py` puts the parameters' uses on the functions of `functions.py`, which form the two sums where a layer has
its inputs at hand; `installed.py` does so for a model; `row_weights.py` says how much each row counts; `graph.py` finds
what cannot take this path; `backward.py` runs it.
"""
