"""Forms of answers: JSON schemas, expressions and choices as tables of allowed tokens.

`request` reads what a row asks for as a regular expression, `automaton` compiles it in
a process of its own, `structure` makes a table for a vocabulary of it, and `rules` are
such tables on the device, where decoding looks up what may come next.
"""
