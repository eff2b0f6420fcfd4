"""A GPT on several devices and in several processes, from outside: the model knows nothing of it."""
