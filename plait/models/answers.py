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
        """One target for every sample and answer; a task's targets stand together, sample by sample."""
        rows: dict[str, list[int]] = {}
        prompts: list[list[int]] = []
        targets: list[list[int]] = []
        for sample in samples:
            for answer in self.answers[sample.task]:
                rows.setdefault(sample.task, []).append(len(prompts))
                prompt, target = self.tokens(sample.value, answer)
                prompts.append(prompt)
                targets.append(target)
        pack = self.pack if self.family.answers == "causal" else self._pack_seq2seq
        return Batch(pack(prompts, targets), rows).to(self.device)

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """Task → [its samples, answers]: log-likelihoods."""
        inputs = dict(batch.inputs)
        targets = inputs.pop("targets")  # [rows, tokens], -100 where nothing is scored
        self.tell(batch)
        real = targets >= 0
        if self.family.answers == "causal":
            reading, places = inputs.pop("reading"), inputs.pop("places")
            spots = torch.stack([reading.unsqueeze(1).expand_as(places)[real], places[real]])
            spots, back = spots.unique(dim=1, return_inverse=True)  # where anything is foretold, each once
            if hasattr(self.body, "routing"):  # by the prompt alone: the answer is not known yet
                inputs["routing_mask"] = _prompts(inputs["attention_mask"], reading, places)
            logits = self.body(**inputs).logits[spots[0], spots[1]]
        else:
            start: Any = getattr(self.body.config, "decoder_start_token_id")  # noqa: B009
            shifted = torch.cat([torch.full_like(targets[:, :1], start), targets[:, :-1].clamp(min=0)], dim=1)
            logits = self.body(**inputs, decoder_input_ids=shifted).logits[real]
            back = torch.arange(len(logits), device=logits.device)
        logp = logits.float().log_softmax(-1)[back, targets[real]]  # [scored tokens]
        total = logp.new_zeros(len(targets)).index_add(0, real.nonzero()[:, 0], logp)
        return {task: total[at].view(-1, len(self.answers[task])) for task, at in batch.rows.items()}

    def generate(self, prompts: Sequence[str]) -> list[str]:
        """The greedy answer to every prompt: its first line, without spaces around it."""
        tokenizer = self.processor
        sides = tokenizer.padding_side, tokenizer.truncation_side
        causal = self.family.answers == "causal"
        # A causal model's answer follows its prompt's end, which is therefore what is kept of a long one.
        tokenizer.padding_side = tokenizer.truncation_side = "left" if causal else "right"
        try:
            inputs = tokenizer(
                list(prompts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.device)
        finally:
            tokenizer.padding_side, tokenizer.truncation_side = sides
        inputs.pop("token_type_ids", None)
        start = inputs["input_ids"].shape[1] if causal else 0

        def written(ids: Tensor, *_: Any) -> Tensor:
            """Which rows have their first line, beyond which nothing is read: most models would write on."""
            texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
            return torch.tensor(["\n" in text.lstrip() for text in texts], device=ids.device)

        out = self.body.generate(  # pyright: ignore[reportCallIssue]
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=[written],
        )  # fmt: skip
        texts = tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
        return [text.strip().split("\n")[0].strip() for text in texts]

    def tokens(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """A finished prompt, cut to `max_length`, and an answer of its own after it."""
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

    def pack(self, prompts: list[list[int]], targets: list[list[int]]) -> dict[str, Tensor]:
        """Targets after their prompts, for a causal model.

        What is read is the prompt and all of the target but its last token, and each such text is read once, so that
        answers of one token cost no more than one answer. `reading` says which row a target's is, `places` where in
        that row each of its tokens is foretold.
        """
        texts = [(*prompt, *target[:-1]) for prompt, target in zip(prompts, targets, strict=True)]
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        ids, mask = _padded([list(text) for text in rows], self.processor.pad_token_id)
        marks, real = _padded(targets, -100)
        first = torch.tensor([len(prompt) - 1 for prompt in prompts]).unsqueeze(1)
        return {
            "input_ids": ids, "attention_mask": mask, "targets": marks,
            "reading": torch.tensor([rows[text] for text in texts]),
            "places": (first + torch.arange(marks.shape[1])) * real,
        }  # fmt: skip

    def _pack_seq2seq(self, prompts: list[list[int]], targets: list[list[int]]) -> dict[str, Tensor]:
        ids, mask = _padded(prompts, self.processor.pad_token_id)
        marks, real = _padded(targets, 0)
        return {"input_ids": ids, "attention_mask": mask, "targets": marks.masked_fill(real == 0, -100)}


def _prompts(mask: Tensor, reading: Tensor, places: Tensor) -> Tensor:
    """Of every text that is read, its prompt: up to where its first answer's first token is foretold."""
    last = torch.full((len(mask),), mask.shape[1], device=mask.device)
    last = last.scatter_reduce(0, reading, places[:, 0], "amin")
    return mask * (torch.arange(mask.shape[1], device=mask.device) <= last.unsqueeze(1))


def _padded(rows: list[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    shape = (len(rows), max(map(len, rows)))
    ids, mask = torch.full(shape, fill), torch.zeros(shape, dtype=torch.long)
    for row, values in enumerate(rows):
        ids[row, : len(values)] = torch.tensor(values)
        mask[row, : len(values)] = 1
    return ids, mask
