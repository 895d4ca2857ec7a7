"""merv-tiny from nothing: clips of coloured shapes, questions about them, and a small MERV that answers them."""
