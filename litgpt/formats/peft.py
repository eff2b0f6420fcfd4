"""LoRA weights as PEFT holds them (https://github.com/huggingface/peft).

A PEFT adapter is a directory with `adapter_config.json` and `adapter_model.safetensors`: for each adapted module of the
Hugging Face model its `lora_A` (r, in), `lora_B` (out, r) and, of DoRA, `lora_magnitude_vector` (out,). Which module of
theirs is which of ours, and which of its rows, says the architecture's rule table: the rows of B go the way of the
weight's rows. An update of ours that has several parts (queries, keys, values) and is one module there becomes one
update of their joint rank, with the parts' A one below the other and their B in columns of their own.

Experts have updates of their own, each under its name, as transformers 4 had them, or all of a layer in one pair of
matrices (`target_parameters`), as transformers 5 holds their weights: `lora_A` (E * r, in), expert after expert, and
`lora_B` (out, r * E), rank after rank. Of a multimodal model the modules are those of its text model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from litgpt.config import Config
from litgpt.formats.rules import Family, RuleTable

ADAPTER_MODEL, ADAPTER_BIN = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"


# Modules that transformers 5 calls other than its files do: by their name in the files.
IN_MEMORY = {"embed_out": "lm_head"}


@dataclass
class RowUpdate:
    """The update of some rows: `scaling * B A`; or those of all experts of a layer."""

    a: Tensor
    """(r, in), or (E, r, in)"""
    b: Tensor
    """(rows, r), or (E, rows, r)"""
    magnitude: Tensor | None
    """(rows,) of DoRA"""


@dataclass
class Update:
    """The update of one module of theirs, or of a tensor of all experts in a layer."""

    part: RowUpdate
    alpha: float

    @property
    def rank(self) -> int:
        return self.part.a.shape[-2]


def family_of(table: RuleTable, name: str, config: Config, ours: bool) -> Family:
    family = table.family(name, config, ours)
    if family is None:
        raise ValueError(f"PEFT adapter: {name} is not a layer of this model that can be adapted.")
    return family


def columns_of_parts(
    rows: list[list[tuple[int, bool]]], blocks: list[RowUpdate], rank: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each tensor of a family: B (rows, blocks, r), which blocks update which rows, and the lengths of the rows."""
    columns, block = [], 0
    for layer in rows:
        total, start = sum(size for size, _ in layer), 0
        b, magnitude = torch.zeros(total, len(blocks), rank), torch.zeros(total)
        mask = torch.zeros(total, len(blocks), dtype=torch.bool)
        for size, updated in layer:
            if updated:
                part, place = blocks[block], slice(start, start + size)
                b[place, block], mask[place, block] = part.b.float(), True
                if part.magnitude is not None:
                    magnitude[place] = part.magnitude.float()
                block += 1
            start += size
        columns.append((b, mask, magnitude))
    return columns


def plain_number(number: float) -> int | float:
    """Without the last digits' error of a root, and an integer where it is one."""
    number = float(f"{number:.12g}")
    return int(number) if number.is_integer() else number
