"""What LoRA's starts are held against: rank 8 and alpha 8 on both grounds, and the figures told of every way."""

from collections.abc import Mapping
from typing import Any

from pondera.replications.adapters._adapting import DIGITS, SENTENCES, Ground, Way

RANK = 8


def lora(ground: Ground, start: bool | str = True, **more: Any) -> Any:
    """LoRA's configuration on this ground, its head trained beside it where it is new."""
    from peft import LoraConfig

    more |= {"modules_to_save": ["head"]} if ground is SENTENCES else {}
    return LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=start, target_modules=list(ground.layers), **more)


def on_digits() -> Any:
    return lora(DIGITS)


def on_sentences() -> Any:
    return lora(SENTENCES)


LORA, LORA_ON_SENTENCES = Way(on_digits), Way(on_sentences, ground=SENTENCES)


def early(way: Way, seed: int) -> float:
    return float(way.end(seed).curve[20:30].mean())


def figures(ways: Mapping[str, Way], seeds: range) -> dict[str, Any]:
    """What every way came to, a seed each."""
    return {
        "loss": {name: way.ends(seeds, "loss") for name, way in ways.items()},
        "loss_of_batches_21_to_30": {name: [early(way, seed) for seed in seeds] for name, way in ways.items()},
        "test_loss": {name: way.ends(seeds, "test_loss") for name, way in ways.items()},
        "accuracy": {name: way.ends(seeds, "accuracy") for name, way in ways.items()},
        "rates": {name: way.rate for name, way in ways.items()},
        "trained": {name: way.end(0).trained for name, way in ways.items()},
    }
