"""Every line that four documents about LitGPT type, as people have them in their notes and scripts, run here.

`workflows.py`, `zero_to_litgpt.py`, `training_recipes.py` and `pretraining.py` are the tables, one a document;
`test_documents.py` runs them, on small stand-ins (`stand_ins.py`) that a hub on loopback serves under the real names.
"""
