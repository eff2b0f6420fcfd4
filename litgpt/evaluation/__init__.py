"""Figures of how good a model is: EleutherAI's lm-evaluation-harness on our engine, and perplexity without it."""
