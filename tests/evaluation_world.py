"""A world in which every completion is known, for the tests of evaluation: sums, a tokenizer, and who answers them."""

import json
import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if terse %}!{% endif %}="


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "<eos>", "<end>", "<think>", "</think>", *"0123456789+-=! x?", r"\boxed{", "}"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?"))
    words = Regex(r"\\boxed\{|</?think>|.")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=["<end>"],
        chat_template=TEMPLATE,
    )


def make_model(tokenizer, cls=Qwen3ForCausalLM, seed=0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    return cls(config).eval()


def save_checkpoint(folder: Path, seed=0, **kwargs) -> str:
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=seed).save_pretrained(folder, **kwargs)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sum_rows() -> list[dict]:
    return [
        {"prompt": [{"role": "user", "content": f"{a}+{b}"}], "answer": str(a + b)} for a in (3, 12) for b in (4, 5)
    ]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Adder:
    """An engine that answers every sum rightly and nothing else, and gives up after `limit` completions."""

    def __init__(self, limit: int | None = None):
        self.tokenizer, self.limit, self.answered = make_tokenizer(), limit, 0

    def completion(self, prompt_ids: list[int]) -> list[int]:
        found = re.search(r"(\d+)\+(\d+)", self.tokenizer.decode(prompt_ids))
        answer = rf"\boxed{{{int(found[1]) + int(found[2])}}}" if found else "?"
        return self.tokenizer(f"{answer}<eos>")["input_ids"]

    def generate(self, requests, sampling, done=()):
        for index, request in enumerate(requests):
            if index not in done:
                if self.answered == self.limit:
                    raise KeyboardInterrupt
                self.answered += 1
                yield index, self.completion(request.prompt_ids)

    def reset_peak_memory(self):
        pass

    def peak_memory(self):
        return 1

    def close(self):
        pass
