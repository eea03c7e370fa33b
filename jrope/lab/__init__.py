"""The long-context laboratory: what a RoPE method does to a model, measured.

`perplexity`, `passkey` and `distance` measure, `statistics` says how sure a mean is,
`journal` keeps the records, `memory` says beforehand what fits.  `jrope evaluate` is
these functions with a command line; from Python, import the module that is wanted:

    from jrope.lab.perplexity import perplexity
"""
