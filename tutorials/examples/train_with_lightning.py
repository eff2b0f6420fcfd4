"""Finetune a model with Lightning's Trainer, on data that litgpt prepares, and save it as a checkpoint.

pip install lightning
python tutorials/examples/train_with_lightning.py CHECKPOINT DATA.json OUT_DIR
"""

import sys
from pathlib import Path

import lightning as L
import torch

from litgpt import LLM
from litgpt.data import JSON


class Finetuned(L.LightningModule):
    def __init__(self, checkpoint: str, data: str) -> None:
        super().__init__()
        self.llm = LLM.load(checkpoint, distribute=None)  # float32, in training mode; the Trainer moves it
        self.data = JSON(json_path=Path(data), val_split_fraction=0.1, prompt_style="checkpoint", mask_prompt=True)
        self.data.connect(self.llm.tokenizer, 2, 256, self.llm.prompt_style)  # rows of a batch, tokens of a row
        self.data.prepare_data()
        self.data.setup()

    def training_step(self, batch, batch_idx):
        _, loss = self.llm(batch["input_ids"], batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        _, loss = self.llm(batch["input_ids"], batch["labels"])
        self.log("val_loss", loss, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def train_dataloader(self):
        return self.data.train_dataloader()

    def val_dataloader(self):
        return self.data.val_dataloader()


def main(checkpoint: str, data: str, out_dir: str, **settings) -> None:
    model = Finetuned(checkpoint, data)
    # litgpt's batches never end: what counts is steps, not epochs.
    settings = {"max_steps": 100, "val_check_interval": 50, **settings}
    trainer = L.Trainer(precision="bf16-mixed" if torch.cuda.is_available() else "32-true", **settings)
    trainer.fit(model)
    print(model.llm.generate("What food do llamas eat?"))
    model.llm.save(out_dir)


if __name__ == "__main__":
    main(*sys.argv[1:4])
