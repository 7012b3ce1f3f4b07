"""Known truths and nulls, and how often each verdict of mechscope is given under them: what `mechscope calibrate` runs.

One module per kind of quantity, each with `TRUTHS`, a tuple of `Truth`; `all_truths` finds them.
"""
