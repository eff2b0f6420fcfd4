"""The way in: from what a user names to an opened checkpoint, and a model from it.

One class per format (`lit`, `huggingface`, `gguf`), and `adapted` for weights that were finetuned on another's. What
commands, the Python API and the server use is `door`: it has `find` look for what is named, and that has `fetch`
download it.
"""
