"""What a fit minimises on unlabeled inputs. Each takes one task's outputs in a batch and gives the mean loss.

entropy       −Σ_c p_c log p_c of p = softmax(scores/T); AdaMerging, arXiv:2310.02575
agreement     KL(p_expert ‖ p) with the answers of the task's own expert
contrastive   InfoNCE on pairs of features: −log softmax_j(cos(a_i, b_j)/T) at j = i; Self Positioning,
                  arXiv:2410.15035
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

Custom = Callable[[str, Tensor], Tensor]
"""(task, scores [n, classes]) → mean loss: an objective of one's own, from Python."""


def entropy(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean entropy of the predictions, in nats. scores: [n, classes]."""
    logp = (scores.float() / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).mean()


def agreement(scores: Tensor, expert: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL divergence of the predictions from the expert's, in nats. Both [n, classes]."""
    logp = (scores.float() / temperature).log_softmax(-1)
    target = (expert.float() / temperature).log_softmax(-1)
    return (target.exp() * (target - logp)).sum(-1).mean()


def contrastive(features: Tensor, temperature: float = 0.05) -> Tensor:
    """InfoNCE with the other pairs of the batch as negatives. features: [2n, width], second halves last."""
    first, second = normalize(features.float(), dim=-1).chunk(2)
    scores = first @ second.T / temperature
    return cross_entropy(scores, torch.arange(len(scores), device=scores.device))
