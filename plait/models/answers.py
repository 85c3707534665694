"""Models that answer in text: causal and text-to-text. A class's score is the log-likelihood of its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.errors import CheckpointError
from plait.models.net import Batch, Net, Sample

NEW_TOKENS = 32
"""Longest generated answer."""


class AnswerNet(Net):
    """A language model with the possible answers of several tasks.

    Scores are sums of log p(token) over an answer's tokens, given the prompt; an answer's end counts for text-to-text
    models (their tokenizers mark it) and does not for causal ones.
    """

    answers: Mapping[str, Sequence[str]] = {}

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """One row for every sample and answer; a task's rows stand together, sample by sample."""
        rows: dict[str, list[int]] = {}
        prompts: list[list[int]] = []
        targets: list[list[int]] = []
        for sample in samples:
            for answer in self.answers[sample.task]:
                rows.setdefault(sample.task, []).append(len(prompts))
                prompt, target = self._tokens(sample.value, answer)
                prompts.append(prompt)
                targets.append(target)
        pack = self._pack_causal if self.family.answers == "causal" else self._pack_seq2seq
        return Batch(pack(prompts, targets), rows).to(self.device)

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """Task → [its samples, answers]: log-likelihoods."""
        inputs = dict(batch.inputs)
        targets = inputs.pop("targets")  # [rows, tokens], -100 where nothing is scored
        self.tell(batch)
        if self.family.answers == "causal":
            if hasattr(self.body, "routing"):  # by the prompt alone: the answer is not known yet
                inputs["routing_mask"] = inputs["attention_mask"] * (targets < 0)
            logits, targets = self.body(**inputs).logits[:, :-1], targets[:, 1:]
        else:
            start: Any = getattr(self.body.config, "decoder_start_token_id")  # noqa: B009
            shifted = torch.cat([torch.full_like(targets[:, :1], start), targets[:, :-1].clamp(min=0)], dim=1)
            logits = self.body(**inputs, decoder_input_ids=shifted).logits
        logp = logits.float().log_softmax(-1)
        picked = logp.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        total = (picked * (targets >= 0)).sum(dim=1)
        return {task: total[at].view(-1, len(self.answers[task])) for task, at in batch.rows.items()}

    def generate(self, prompts: Sequence[str]) -> list[str]:
        """The greedy answer to every prompt: its first line, without spaces around it."""
        tokenizer = self.processor
        side = tokenizer.padding_side
        causal = self.family.answers == "causal"
        tokenizer.padding_side = "left" if causal else "right"
        try:
            inputs = tokenizer(
                list(prompts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.device)
        finally:
            tokenizer.padding_side = side
        inputs.pop("token_type_ids", None)
        out = self.body.generate(  # pyright: ignore[reportCallIssue]
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        new = out[:, inputs["input_ids"].shape[1] :] if causal else out
        return [text.strip().split("\n")[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _tokens(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        tokenizer = self.processor
        if self.family.answers == "seq2seq":
            asked = tokenizer(prompt, truncation=True, max_length=self.max_length)["input_ids"]
            return asked, tokenizer(answer)["input_ids"]
        # Tokenised together and then cut: a tokenizer may treat a text's first word otherwise than the next.
        asked, both = (self._open(tokenizer(text)["input_ids"]) for text in (prompt, f"{prompt} {answer}"))
        target = both[len(asked) :]
        if not target:
            raise CheckpointError(f"the answer '{answer}' has no tokens of its own after its prompt; use another")
        return both[: len(asked)][-self.max_length :], target

    def _open(self, tokens: list[int]) -> list[int]:
        """Without the end mark that some tokenizers add: what follows is part of the same text."""
        return tokens[:-1] if tokens and tokens[-1] == self.processor.eos_token_id else tokens

    def _pack_causal(self, prompts: list[list[int]], targets: list[list[int]]) -> dict[str, Tensor]:
        longest = max(len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True))
        shape = (len(prompts), longest)
        ids = torch.full(shape, self.processor.pad_token_id)
        mask, marks = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            stop = len(prompt) + len(target)
            ids[row, :stop] = torch.tensor(prompt + target)
            mask[row, :stop] = 1
            marks[row, len(prompt) : stop] = torch.tensor(target)
        return {"input_ids": ids, "attention_mask": mask, "targets": marks}

    def _pack_seq2seq(self, prompts: list[list[int]], targets: list[list[int]]) -> dict[str, Tensor]:
        ids, mask = _padded(prompts, self.processor.pad_token_id)
        marks, real = _padded(targets, 0)
        return {"input_ids": ids, "attention_mask": mask, "targets": marks.masked_fill(real == 0, -100)}


def _padded(rows: list[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    shape = (len(rows), max(map(len, rows)))
    ids, mask = torch.full(shape, fill), torch.zeros(shape, dtype=torch.long)
    for row, values in enumerate(rows):
        ids[row, : len(values)] = torch.tensor(values)
        mask[row, : len(values)] = 1
    return ids, mask
