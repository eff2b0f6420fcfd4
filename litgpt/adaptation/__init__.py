"""Changing a GPT from outside by a few trained weights: LoRA and adapters. The model knows neither."""
