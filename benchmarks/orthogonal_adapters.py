"""Rotations of a layer's input: OFTv2 and qGOFT here beside PEFT's OFT and BOFT and beside OFT that turns the weight.

One frozen square linear layer, forward and backward in float32 on one thread; processor time, peak memory of the step.
"""

import gc
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pondera.replications.adapters.oftv2 import BLOCK, peak_bytes, seconds, step

WIDTHS, TOKENS, REPEATS = (256, 512, 1024, 2048), (64, 512, 2048), 5


def adapted(width: int, tokens: int, config: Any) -> tuple[Callable[[], None], int]:
    """(one step, number of trained parameters)."""
    import peft

    net = peft.get_peft_model(nn.Sequential(nn.Linear(width, width)), config)
    trained = [p for p in net.parameters() if p.requires_grad]
    x, back = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)

    def run() -> None:
        net(x).backward(back)
        for p in (x, *trained):
            p.grad = None

    return run, sum(p.numel() for p in trained)


def oft(width: int, tokens: int) -> tuple[Callable[[], None], int]:
    from pondera.adapters.oft import OftConfig

    return adapted(width, tokens, OftConfig(block_size=BLOCK, target_modules=["0"]))


def qgoft(width: int, tokens: int) -> tuple[Callable[[], None], int]:
    from pondera.adapters.givens import GivensConfig

    return adapted(width, tokens, GivensConfig(target_modules=["0"]))


def peft_oft(width: int, tokens: int) -> tuple[Callable[[], None], int]:
    from peft import OFTConfig

    return adapted(width, tokens, OFTConfig(oft_block_size=BLOCK, target_modules=["0"]))


def peft_boft(width: int, tokens: int) -> tuple[Callable[[], None], int]:
    from peft import BOFTConfig

    return adapted(width, tokens, BOFTConfig(boft_block_size=4, target_modules=["0"]))


def weight_centric(width: int, tokens: int) -> tuple[Callable[[], None], int]:
    return step(width, tokens, "weight"), width * (BLOCK - 1) // 2


PAIRS = (
    ("OFTv2", "OftConfig, exact", oft, "PEFT OFTConfig, 5 terms", peft_oft),
    ("OFTv2", "OftConfig, exact", oft, "OFT that builds W R, 5 terms", weight_centric),
    ("qGOFT", "GivensConfig", qgoft, "PEFT BOFTConfig, blocks of 4", peft_boft),
)


def exponent(widths: tuple[int, ...], times: list[float]) -> float:
    """Slope of log time over log width."""
    x, y = (torch.tensor([math.log(v) for v in values], dtype=torch.float64) for values in (widths, times))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def run(quick: bool = False) -> list[dict[str, Any]]:
    warnings.filterwarnings("ignore", module="peft")
    rows = []
    widths, counts = (WIDTHS[:2], TOKENS[:1]) if quick else (WIDTHS, TOKENS)
    for tokens in counts:
        for name, our_name, our, peer_name, peer in PAIRS:
            times: dict[str, list[float]] = {"ours": [], "peer": []}
            for width in widths:
                (ours, our_count), (other, peer_count) = our(width, tokens), peer(width, tokens)
                took = seconds({"ours": ours, "peer": other}, REPEATS if width * tokens < 2**21 else 2)
                held = {"ours": peak_bytes(ours), "peer": peak_bytes(other)}
                for side, spent in took.items():
                    times[side].append(spent)
                mib = {side: b / 2**20 for side, b in held.items()}
                rows.append(
                    {
                        "name": f"{name}, width {width}, {tokens} tokens",
                        "ours": our_name,
                        "peer": peer_name,
                        "seconds_ours": took["ours"],
                        "seconds_peer": took["peer"],
                        "ratio": took["ours"] / took["peer"],
                        "bytes_ours": held["ours"],
                        "bytes_peer": held["peer"],
                        "note": f"peak {mib['ours']:.1f} MiB against {mib['peer']:.1f} MiB; {our_count} trained numbers against "
                        f"{peer_count}",
                    }
                )
                gc.collect()
            slopes = {side: exponent(widths, values) for side, values in times.items()}
            rows[-1]["note"] += f"; time grows as width^{slopes['ours']:.2f} against width^{slopes['peer']:.2f}"
    return rows


if __name__ == "__main__":
    print(*run(), sep="\n")
