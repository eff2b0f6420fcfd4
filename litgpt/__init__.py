"""Language models from download to deployment, in code made to be read."""

__version__ = "0.1.0"
