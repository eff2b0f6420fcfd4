"""Weights in 4 or 8 bits, put into a GPT from outside. The model does not know them."""
