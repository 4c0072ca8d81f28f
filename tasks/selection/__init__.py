"""Which pseudo-labeled images a student learns from: the rules, and the order in which the copies are written.

`scan` streams the predictions; `rank` finds exact places in rankings of any size; `rules` filters and balances;
`layout` shuffles the copies; `scatter` brings labels and facts to them; `shards` writes them. Memory does not grow with
the number of images.
"""
