"""What mixing experts for every sample costs: an MLP with K experts, as multiples of one static forward.

    python bench/routing.py                       # K = 2 … 16, batches 1 … 256, 17 and 197 tokens
    python bench/routing.py --experts 8 --batch 64 --tokens 17

Ways, all in one process and taken in turn, so that what disturbs the machine disturbs all; medians of wall times:
    static      one model's weights for all samples
    loop        for every sample its own merged weights, one after the other
    ensemble    all K experts on all samples
    dense       ours, whole task vectors, soft weights
    one-hot     ours, whole task vectors, every sample one expert (top-1, task switches)
    rank R      ours, low-rank experts, soft weights
    rank R top 1 ours, low-rank experts, every sample one
Every way is compared with the loop first. Adds lines to bench/results/routing.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from plait.evaluate.compare import machine
from plait.routing.layers import Parts, Route, RoutedLinear
from plait.routing.stores import Store

COLUMNS = ("date", "machine", "threads", "dtype", "experts", "batch", "tokens", "way", "ms", "of_static", "mb")
WIDTH, INNER = 384, 1536


def routed(base: nn.Linear, deltas: Tensor, rank: int | None, route: Route) -> RoutedLinear:
    """A routed layer with dense or low-rank experts."""
    k, m, n = deltas.shape
    if rank is None:
        store = Store("dense", (m, n), k, precision=str(deltas.dtype).removeprefix("torch."))  # type: ignore[arg-type]
        parts = {"values": deltas}
    else:
        store = Store("low_rank", (m, n), k, str(deltas.dtype).removeprefix("torch."), ranks=(rank,) * k)  # type: ignore[arg-type]
        parts = {"down": torch.randn(k * rank, n) * 0.01, "up": torch.randn(k * rank, m) * 0.01}
    held = {name: value.to(deltas.dtype) for name, value in store.encode(parts).items()}
    return RoutedLinear(base, {"weight": Parts(store, held)}, route)


class Mlp(nn.Module):
    """Two layers that share a route."""

    def __init__(self, first: nn.Module, second: nn.Module, route: Route | None = None) -> None:
        super().__init__()
        self.first, self.second, self.route = first, second, route

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        if self.route is not None:
            self.route.weights = weights
        return self.second(torch.nn.functional.gelu(self.first(x)))


def ways(k: int, batch: int, dtype: torch.dtype, ranks: list[int]) -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
    """Name → a forward pass, and the bytes of what it holds."""
    one, two = nn.Linear(WIDTH, INNER).to(dtype), nn.Linear(INNER, WIDTH).to(dtype)
    a, b = (torch.randn(k, *layer.weight.shape).to(dtype) * 0.01 for layer in (one, two))
    soft = torch.softmax(torch.randn(batch, k), 1).to(dtype)
    hot = torch.eye(k).to(dtype)[torch.arange(batch) % k]
    route = Route("mlp")
    dense = Mlp(routed(one, a, None, route), routed(two, b, None, route), route)
    static = Mlp(one, two)

    def loop(x: Tensor) -> Tensor:
        found = []
        for row, w in zip(x, soft, strict=True):
            first = torch.addmv(one.weight.reshape(-1), a.reshape(k, -1).T, w).view_as(one.weight)
            second = torch.addmv(two.weight.reshape(-1), b.reshape(k, -1).T, w).view_as(two.weight)
            h = torch.nn.functional.gelu(torch.nn.functional.linear(row, first, one.bias))
            found.append(torch.nn.functional.linear(h, second, two.bias))
        return torch.stack(found)

    def ensemble(x: Tensor) -> Tensor:
        return torch.stack([static(x) for _ in range(k)]).mean(0)

    base = sum(p.numel() * p.element_size() for p in static.parameters())
    whole = base + (a.numel() + b.numel()) * a.element_size()
    found = {
        "static": (static, base), "loop": (loop, whole), "ensemble": (ensemble, base * k),
        "dense": (lambda x: dense(x, soft), whole), "one-hot": (lambda x: dense(x, hot), whole),
    }  # fmt: skip
    for rank in ranks:
        thin = Mlp(routed(one, a, rank, route), routed(two, b, rank, route), route)
        size = base + 2 * k * rank * (WIDTH + INNER) * a.element_size()
        found[f"rank {rank}"] = (lambda x, thin=thin: thin(x, soft), size)
        few = Route("mlp")
        few.top = 1
        own = Mlp(routed(one, a, rank, few), routed(two, b, rank, few), few)
        found[f"rank {rank} top 1"] = (lambda x, own=own: own(x, hot), size)
    return found


@torch.inference_mode()
def measure(k: int, batch: int, tokens: int, dtype: torch.dtype, repeats: int) -> dict[str, tuple[float, int]]:
    """Way → median seconds, and bytes held."""
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, WIDTH).to(dtype)
    runs = ways(k, batch, dtype, [1, 16])
    apart = float((runs["dense"][0](x) - runs["loop"][0](x)).abs().max())
    assert apart <= (1e-4 if dtype == torch.float32 else 0.1), f"dense is not the loop: {apart}"
    times: dict[str, list[float]] = {name: [] for name in runs}
    for way, _ in runs.values():
        way(x)
    for _ in range(repeats):
        for name, (way, _) in runs.items():
            start = time.perf_counter()
            way(x)
            times[name].append(time.perf_counter() - start)
    return {name: (statistics.median(values), runs[name][1]) for name, values in times.items()}


def main() -> None:
    """Measure, print a table, add lines to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--tokens", type=int, nargs="+", default=[17, 197])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "routing.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fresh = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(COLUMNS)
        for k in args.experts:
            for tokens in args.tokens:
                for batch in args.batch:
                    found = measure(k, batch, tokens, getattr(torch, args.dtype), args.repeats)
                    static = found["static"][0]
                    cells = [f"{name} {seconds / static:.2f}" for name, (seconds, _) in found.items()]
                    print(f"K {k:2d}, {tokens:3d} tokens, batch {batch:3d}:", ", ".join(cells), flush=True)
                    for name, (seconds, size) in found.items():
                        writer.writerow(
                            (datetime.date.today(), machine(), args.threads, args.dtype, k, batch, tokens, name,
                             f"{1e3 * seconds:.2f}", f"{seconds / static:.2f}", f"{size / 1e6:.1f}")
                        )  # fmt: skip


if __name__ == "__main__":
    main()
