import pytest
import torch
from safetensors.torch import load_file, save_file

from pondera.errors import BadInput
from pondera.merge import merge_recipe


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"a": 0.0, "b": 1.0, "c": 4.0}.items():
        save_file({"w": torch.full((4,), value), "head.w": torch.full((2,), value)}, f"{name}.safetensors")
    return tmp_path


def made(text, **kwargs):
    with open("recipe.yml", "w") as file:
        file.write(text)
    merge_recipe("recipe.yml", "out.safetensors", **kwargs)
    return load_file("out.safetensors")


def models(*given):
    return "models:\n" + "".join(f"  - model: {n}.safetensors\n    parameters: {{{p}}}\n" for n, p in given)


LINEAR = "merge_method: linear\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (models(("a", "weight: 1"), ("b", "weight: 3")), 0.75),  # normalised by default, as mergekit does it
        (models(("a", "weight: 0.5"), ("b", "weight: 0.5")) + "parameters: {normalize: false}", 0.5),
        (models(("a", ""), ("c", "weight: 3")) + "parameters: {weight: 1e0, normalize: true}", 3.0),
        (models(("a", ""), ("b", "")) + "parameters: {weight: 0.3}", 0.5),
        (models(("a", "weight: 1"), ("c", "weight: 3")) + "base_model: c.safetensors\ntokenizer_source: base", 3.0),
        (models(("c", "weight: 1"), ("a", "weight: 3")) + "tokenizer_source: c.safetensors", 1.0),
    ],
)
def test_linear(here, text, value):
    assert made(LINEAR + text)["w"].tolist() == [value] * 4


def test_linear_agrees_with_mergekit(here):
    """mergekit 0.1.5 on float32 waves, weights 1, 2 and 4: position-weighted sum of the result."""
    place = torch.arange(1, 31, dtype=torch.float64)
    waves = [torch.sin(torch.arange(30.0) * (0.7 + 0.1 * k) + k) for k in range(3)]
    for k, wave in enumerate(waves):
        save_file({"w": wave}, f"{k}.safetensors")
    got = made(LINEAR + models(("0", "weight: 1"), ("1", "weight: 2"), ("2", "weight: 4")))["w"].double()
    exact = sum(a * w.double() for a, w in zip((1, 2, 4), waves)) / 7
    assert ((got - exact) * place).sum().abs() < 1e-4


def test_the_other_methods(here):
    base = "base_model: a.safetensors\nmodels: [{model: b.safetensors}, {model: a.safetensors}]\n"
    assert made(f"merge_method: wise_ft\n{base}parameters: {{alpha: 0.25}}")["w"].tolist() == [0.25] * 4
    text = f"merge_method: bang\n{base}parameters: {{alpha: 0.5, head: head, scale: 0.5}}"
    assert made(text)["head.w"].tolist() == [0.25] * 2
    stock = "merge_method: model_stock\nbase_model: a.safetensors\nmodels: [b.safetensors, c.safetensors]\n"
    assert made(stock + "parameters: {filter_wise: false}")["w"].tolist() == [2.5] * 4


def test_drop_and_dtype(here):
    text = LINEAR + models(("a", "weight: 1"), ("b", "weight: 1")) + "dtype: float16\n"
    assert made(text)["w"].dtype == torch.float16
    assert made(text + "out_dtype: bfloat16")["w"].dtype == torch.bfloat16
    assert made(text + "out_dtype: bfloat16", dtype="float64")["w"].dtype == torch.float64
    assert list(made(text + "parameters: {drop: [head]}")) == ["w"]


GOOD = models(("a", "weight: 1"), ("b", "weight: 1"))
BASE = "base_model: a.safetensors\nmodels: [b.safetensors, c.safetensors]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_method: ties\n" + GOOD, "has the methods linear, model_stock, wise_ft, bang, and the recipe asks for merge_method 'ties'"),
        (GOOD, "merge_method None"),
        (LINEAR + "slices: []", "has no slices, which mergekit has"),
        (LINEAR + GOOD + "chat_template: auto", "has no chat_template"),
        (LINEAR + GOOD + "tokenizer_source: union", "copies the base's tokenizer .* asks for 'union'"),
        (LINEAR + GOOD + "dtyp: float16", r"does not know 'dtyp' in the recipe; did you mean .*dtype"),
        (LINEAR + GOOD + "parameters: {int8_mask: true}", r"does not know 'int8_mask' in the parameters of linear .known: drop, normalize, weight"),
        (LINEAR + models(("a", "weight: 1, density: 0.5"), ("b", "weight: 1")), "does not know 'density' in the parameters of a model"),
        (LINEAR + "models: [{model: a.safetensors, wieght: 1}]", "does not know 'wieght' in a model of the recipe"),
        ("merge_method: model_stock\n" + BASE + "parameters: {alpha: 1}", r"'alpha' in the parameters of model_stock .known: filter_wise"),
        ("merge_method: model_stock\nbase_model: a.safetensors\n" + GOOD, "'weight' in the parameters of a model in model_stock .*known: none"),
        ("merge_method: model_stock\nmodels: [b.safetensors, c.safetensors]", "needs a base_model for model_stock"),
        ("merge_method: model_stock\n" + BASE + "parameters: {filter_wise: 1}", "true or false as filter_wise, got 1"),
        ("merge_method: wise_ft\n" + BASE, "one model beside the base_model for wise_ft, got 2"),
        (LINEAR + models(("a", "weight: 1"), ("b", "")), "needs one number as weight of b.safetensors, got None"),
        (LINEAR + models(("a", "weight: [0, 1]"), ("b", "weight: 1")), r"one number as weight of a.safetensors, got \[0, 1\]"),
        (LINEAR + models(("a", "weight: 1"), ("b", "weight: -1")), r"a sum above 0 to divide by"),
        (LINEAR + models(("a", "weight: 3"), ("b", "weight: -1")), "not negative"),
        (LINEAR + models(("a", "weight: .nan"), ("b", "weight: 1")), "a sum above 0"),
        (LINEAR + GOOD + "parameters: {normalize: false}", "add up to one where normalize is false"),
        (LINEAR + GOOD + "base_model: c.safetensors", "base_model c.safetensors is not"),
        (LINEAR + GOOD + "dtype: int8", "cannot write numbers as 'int8'"),
        (LINEAR + GOOD + "merge_method: linear", "finds 'merge_method' twice in recipe.yml, line 7"),
        (LINEAR + "models: a.safetensors", "needs a list of models in the recipe, got 'a.safetensors'"),
        (LINEAR + "models: [{model: 3}]", "a path or the hub's id as model, got 3"),
        (LINEAR + "models: [3]", "needs names and values as a model, got 3"),
        ("- a", "needs a recipe with merge_method and models in recipe.yml, got list"),
        ("a: [", "cannot read recipe.yml as a recipe"),
        ("? [a]\n: b", "cannot read recipe.yml as a recipe"),
        ("!!python/object/apply:os.system ['true']", "cannot read recipe.yml as a recipe"),
    ],
)  # fmt: skip
def test_refused_in_one_sentence_and_nothing_passed_over(here, text, words):
    with pytest.raises(BadInput, match=words) as error:
        made(text)
    assert "\n" not in str(error.value)
    assert not (here / "out.safetensors").exists()


def test_no_such_recipe(here):
    with pytest.raises(BadInput, match="cannot read none.yml as a recipe"):
        merge_recipe("none.yml", "out.safetensors")
