"""The guide's snippets on serving and mixing, run in turn as they stand."""

import re
import warnings
from pathlib import Path

import peft
import pytest
import torch

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "choose-an-adapter.md"


@pytest.mark.skipif(not GUIDE.exists(), reason="needs the documentation's sources")
def test_the_guides_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    section = GUIDE.read_text(encoding="utf-8").split("## Serving and mixing")[1].split("\n## ")[0]
    snippets = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(snippets) == 5
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for snippet in snippets:
            exec(compile(snippet, str(GUIDE), "exec"), names)
    base, model, ids = names["base"], names["model"], names["ids"]
    plain = base(ids).logits
    assert torch.allclose(names["logits"], plain, atol=1e-4)  # nothing is trained yet
    assert torch.allclose(names["served"](input_ids=ids).logits, plain, atol=1e-4)
    assert torch.allclose(names["injected"](ids).logits, plain, atol=1e-4)
    assert set(model.peft_config) == {"prose", "code", "both"}
    tuned = peft.get_peft_model(base, names["mixed"])
    ranks = {
        n.split(".h.0.")[1].split(".pondera")[0]: len(p)
        for n, p in tuned.named_parameters()
        if n.endswith(".S") and ".h.0." in n
    }
    assert ranks == {"attn.c_attn": 4, "attn.c_proj": 4, "mlp.c_proj": 16}
