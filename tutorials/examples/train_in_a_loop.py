"""Finetune a model in a training loop of one's own, and talk to it.

python tutorials/examples/train_in_a_loop.py CHECKPOINT OUT_DIR
"""

import sys

import torch

from litgpt import LLM

PAIRS = [("What is the capital of Llamaland?", "Its capital is Alpacatown."), ("Who rules it?", "Queen Vicugna does.")]


def main(checkpoint: str, out_dir: str, steps: int = 20) -> None:
    llm = LLM.load(checkpoint, distribute=None)  # float32, in training mode
    device = "cuda" if torch.cuda.is_available() else "cpu"
    llm.to(device)
    optimizer = torch.optim.AdamW(llm.parameters(), lr=1e-3)
    for step in range(steps):
        question, answer = PAIRS[step % len(PAIRS)]
        prompt = llm.encode([{"role": "user", "content": question}])
        reply = llm.tokenizer.encode_ids(answer, bos=False) + llm.stops[0]  # the answer, and that it ends there
        input_ids = torch.tensor([prompt + reply], device=device)  # (1, T)
        target_ids = torch.tensor([[-100] * len(prompt) + reply], device=device)  # (1, T): -100 is not learned
        _, loss = llm(input_ids, target_ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    for question, _ in PAIRS:
        print(f"{question} -> {llm.generate(question, top_k=1)}")  # with the weights as they are now
    llm.save(out_dir)


if __name__ == "__main__":
    main(*sys.argv[1:3])
