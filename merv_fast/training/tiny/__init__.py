"""merv-tiny from nothing: clips of coloured shapes, questions about them, and a small MERV that is to answer them.

Not finished: the encoders learn what they are for, the language model does not yet learn to answer well enough, and
the bundled merv-tiny has random weights.
"""
