"""Train the demo's checkpoint: a Llama with grouped-query attention that writes Python.

The data is the Python standard library's own source (``stdlib_source.py``), so nothing has to be downloaded. The
weights are trained in float32 and stored in bfloat16; model and tokenizer load with ``from_pretrained``, offline.

    python examples/04_train_tiny_model.py                      # the full run: about 40 minutes on one core
    python examples/04_train_tiny_model.py --steps 3 --out DIR  # a quick look that everything works
"""

import argparse
import itertools
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from stdlib_source import read_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEFAULT_OUT = Path(__file__).parent / "checkpoints" / "stdlib-llama-2m"
VOCAB_SIZE = 2048
WINDOW_TOKENS = 256
END, PAD = "<|end|>", "<|pad|>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that pads on the left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, padding_side="left"
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model: 2.3 million parameters, 6 query heads on 2 kv heads."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Join all texts into one int64 row of tokens, each text behind an end token."""
    token_ids: list[int] = []
    for text in texts:
        token_ids.append(tokenizer.bos_token_id)
        token_ids.extend(tokenizer.encode(text, add_special_tokens=False))
    return torch.tensor(token_ids)


def batches(tokens: Tensor, rows: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield ``(rows, WINDOW_TOKENS + 1)`` windows for ever: each epoch another phase and another order."""
    while True:
        phase = int(torch.randint(WINDOW_TOKENS, (), generator=generator))
        starts = torch.arange(phase, len(tokens) - WINDOW_TOKENS, WINDOW_TOKENS)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chunk in starts.split(rows):
            if len(chunk) == min(rows, len(starts)):
                yield tokens[chunk[:, None] + torch.arange(WINDOW_TOKENS + 1)]


def window_loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Return the mean cross entropy of predicting each window's next tokens."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Tensor, max_windows: int) -> float:
    """Return the perplexity per token over the first windows of a held-out row of tokens."""
    windows = tokens.unfold(0, WINDOW_TOKENS + 1, WINDOW_TOKENS)[:max_windows]
    model.eval()
    total = sum(float(window_loss(model, chunk)) * len(chunk) for chunk in windows.split(16))
    model.train()
    return math.exp(total / len(windows))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up over the first 2 %, stay, and fall linearly to zero over the last half."""
    warmup = max(1, steps // 50)
    return peak * min((step + 1) / warmup, 1.0, 2.0 * (steps - step) / steps)


def optimizers(model: LlamaForCausalLM, peak: float) -> list[tuple[torch.optim.Optimizer, float]]:
    """Pair each optimizer with its peak rate: Muon for the layers' matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [(muon, peak), (torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95), weight_decay=0.0), peak)]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, readme: str) -> None:
    """Write a bfloat16 copy of the weights, the tokenizer and the README to a folder."""
    stored = LlamaForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(readme, encoding="utf-8")


def describe(args: argparse.Namespace, step: int, parameters: int, seen: int, train_tokens: int, value: float) -> str:
    """Write the checkpoint's README."""
    return (
        f"# stdlib-llama-2m\n\n"
        f"A Llama-architecture model with grouped-query attention (6 query heads, 2 kv heads, head_dim 32) that "
        f"continues Python source.\n\n"
        f"| | |\n|---|---|\n"
        f"| made by | `python examples/04_train_tiny_model.py --steps {args.steps} --seed {args.seed} "
        f"--batch-rows {args.batch_rows} --learning-rate {args.learning_rate}` |\n"
        f"| data | the standard library's source of Python {platform.python_version()}, tests left out: "
        f"{train_tokens} tokens; one file in 20 is held out by the checksum of its name |\n"
        f"| versions | torch {torch.__version__}, {torch.get_num_threads()} thread(s) |\n"
        f"| parameters | {parameters} (stored in bfloat16) |\n"
        f"| steps | {step} of {args.steps}, {seen} tokens seen |\n"
        f"| held-out perplexity per token | {value:.2f} |\n\n"
        f"Weights and tokenizer were made from scratch by that script; the data itself is not in this folder.\n"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-rows", type=int, default=8, help=f"windows of {WINDOW_TOKENS} tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="peak learning rate")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--max-windows", type=int, default=512, help="held-out windows to evaluate")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    texts = read_texts(held_out=False)
    print(f"training the tokenizer on {len(texts)} files ({sum(map(len, texts)) / 1e6:.1f} MB)", flush=True)
    tokenizer = train_tokenizer(texts)
    tokens = encode(tokenizer, texts)
    held_out = encode(tokenizer, read_texts(held_out=True))
    model = build_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(tokens)} training tokens, {len(held_out)} held-out tokens", flush=True)

    optimizer_rates = optimizers(model, args.learning_rate)
    model.train()
    started = time.monotonic()
    progress = tqdm(itertools.islice(batches(tokens, args.batch_rows, generator), args.steps), total=args.steps)
    for step, windows in enumerate(progress):
        for optimizer, peak in optimizer_rates:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, peak)
            optimizer.zero_grad(set_to_none=True)
        loss = window_loss(model, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizer_rates:
            optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
        done = step + 1
        if done == args.steps or done % args.save_every == 0:
            value = perplexity(model, held_out, args.max_windows)
            seen = done * windows.shape[0] * WINDOW_TOKENS
            save(model, tokenizer, args.out, describe(args, done, parameters, seen, len(tokens), value))
            progress.write(f"step {done}: held-out perplexity per token {value:.2f}")
    print(f"wrote {args.out} after {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
