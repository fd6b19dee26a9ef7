"""The glyphs: scenes and prompts, the pipeline's contract, the trained base, the judges."""

import copy

import pytest
import torch

from pondera.customize.glyphs import (
    BACKGROUNDS,
    COLOURS,
    CONCEPTS,
    GLYPHS,
    POSITIONS,
    GlyphPipeline,
    Scene,
    base,
    concept_image,
    draw,
    judges,
    prompt,
    sample_prompt,
    sample_scene,
)
from pondera.customize.glyphs._images import PAIRS, PATTERNS, PLAIN, background
from pondera.customize.glyphs._judge import judged_images, spoil
from pondera.customize.glyphs._pipeline import BASE, TOKENS
from pondera.errors import BadInput


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- images and prompts ---


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "a glyph"),
        ({"glyph": "letter A", "colours": ("orange",)}, "an orange letter A"),
        (
            {"glyph": "heart", "colours": ("red", "yellow"), "position": "center"},
            "a red and yellow heart at the center",
        ),
        ({"background": "black", "position": "top left"}, "a glyph on a black background at the top left"),
    ],
)
def test_prompt_names_what_is_given(parts, words):
    assert prompt(**parts) == words


def test_a_square_is_where_and_what_it_should_be():
    image = draw(Scene("square", ("red",), "blue", "top left"))
    red = (image - torch.tensor(COLOURS["red"]).reshape(3, 1, 1) / 255).abs().amax(0) < 0.2
    rows, columns = red.nonzero().unbind(1)
    assert len(rows) == 64 and rows.max() - rows.min() == 7 and columns.max() - columns.min() == 7
    assert rows.min() == columns.min() == 1
    blue = (image - torch.tensor(PLAIN["blue"]).reshape(3, 1, 1) / 255).abs().amax(0) < 1e-6
    assert (blue ^ red).all()


@pytest.mark.parametrize(("position", "row", "column"), [("center", 7.5, 7.5), ("bottom left", 11.5, 3.5)])
def test_jitter_stays_near_the_position(position, row, column):
    generator, corners = seeded(), set()
    for _ in range(40):
        image = draw(Scene("square", ("yellow",), "black", position), generator=generator)
        where = image.sum(0).nonzero().float()
        assert abs(where[:, 0].mean() - row) <= 1.5 and abs(where[:, 1].mean() - column) <= 1.5
        corners.add(tuple(where[0].tolist()))
    assert len(corners) > 3


def test_patterns():
    stripes, checks = background("striped"), background("checkered")
    assert torch.equal(stripes[:, :, 0], stripes[:, :, 9]) and not torch.equal(stripes[:, 1], stripes[:, 2])
    assert torch.equal(checks[:, 0, :4], checks[:, 4, 4:8]) and not torch.equal(checks[:, 0, 3], checks[:, 0, 4])


def test_two_tones_split_by_rows_or_columns():
    image = concept_image("eject", "black", "center")  # pink above yellow
    lit = image.sum(0) > 2
    blue = image[2][lit]
    assert blue[0] > 0.7 and blue[-1] < 0.3
    flag = draw(Scene("square", ("white", "red"), "black", "center"))
    assert flag[2].sum(1).nonzero().flatten().tolist() == list(range(4, 12))
    assert flag[:, 4, 8].min() > 0.95 and flag[2, 11, 8] < 0.2


def test_concepts_are_new_distinct_and_visible():
    assert len(CONCEPTS) >= 8
    assert not {c.character for c in CONCEPTS.values()} & set(GLYPHS.values())
    assert not {c.tones for c in CONCEPTS.values()} & set(PAIRS)
    assert not {tone for c in CONCEPTS.values() for tone in c.tones} & {*PLAIN, *PATTERNS}
    images = torch.stack([concept_image(name, "gray") for name in CONCEPTS])
    apart = torch.cdist(images.flatten(1), images.flatten(1)) + 99 * torch.eye(len(images))
    assert apart.min() > 2.5
    assert ((images - background("gray")).abs().amax(1) > 0.2).flatten(1).sum(1).min() >= 12


def test_the_stream_is_reproducible_and_never_shows_a_concept():
    def stream(seed):
        generator = seeded(seed)
        scenes = [sample_scene(generator) for _ in range(300)]
        return scenes, [sample_prompt(s, generator) for s in scenes]

    scenes, words = stream(3)
    assert (scenes, words) == stream(3) and (scenes, words) != stream(4)
    assert {s.glyph for s in scenes} == set(GLYPHS) and {s.background for s in scenes} == set(BACKGROUNDS)
    assert {s.position for s in scenes} == set(POSITIONS) and {len(s.colours) for s in scenes} == {1, 2}
    assert all(s.background not in s.colours for s in scenes)
    assert 20 <= sum(" glyph" in w for w in words) <= 70
    drawn = [draw(s, generator=seeded(1)) for s in scenes[:3]]
    assert all(torch.equal(a, draw(s, generator=seeded(1))) for a, s in zip(drawn, scenes))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda: concept_image("star"), "concept 'star'"),
        (lambda: concept_image("knight", "teal"), "background 'teal'"),
        (lambda: concept_image("knight", "blue", "left"), "position 'left'"),
        (lambda: draw(Scene("starr", ("red",), "blue", "center")), "did you mean star"),
        (lambda: draw(Scene("star", ("crimson",), "blue", "center")), "colour 'crimson'"),
        (lambda: draw(Scene("star", (), "blue", "center")), "one or two colours"),
    ],
)
def test_unknown_names_are_refused(wrong, named):
    with pytest.raises(BadInput, match=named):
        wrong()


# --- the pipeline ---


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return base(None)


def few(pipe, prompts="a red star", seed=1, **options):
    return pipe(prompts, num_inference_steps=2, generator=seeded(seed), output_type="pt", **options).images


def test_shapes_types_and_order(pipe):
    images = few(pipe, ["a red star", "a blue heart"], num_images_per_prompt=2)
    assert images.shape == (4, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, few(pipe, ["a red star", "a blue heart"], num_images_per_prompt=2))
    assert not torch.equal(images, few(pipe, ["a red star", "a blue heart"], num_images_per_prompt=2, seed=2))
    plain = pipe("a", num_inference_steps=1, guidance_scale=1.0)
    assert plain.images[0].size == (16, 16)
    assert pipe("a", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)
    both = [seeded(1), seeded(1)]
    twins = pipe(["a star"] * 2, num_inference_steps=1, generator=both, output_type="pt").images
    assert torch.allclose(twins[0], twins[1], atol=1e-5)


def test_guidance_is_the_textbook_formula(pipe):
    seen = []
    with torch.no_grad():
        prompts, against = pipe.encode_prompt("a red star", negative_prompt="a heart")
        start = torch.randn((1, 3, 16, 16), generator=seeded(1))
        t = torch.tensor(999)
        toward, away = (pipe.unet(start, t, encoder_hidden_states=s).sample for s in (prompts, against))
    pipe.scheduler.set_timesteps(1)
    wanted = pipe.scheduler.step(away + 4.0 * (toward - away), t, start).prev_sample
    pipe(
        "a red star",
        negative_prompt="a heart",
        guidance_scale=4.0,
        num_inference_steps=1,
        generator=seeded(1),
        callback_on_step_end=lambda p, i, t, given: seen.append(given["latents"]) or {},
    )
    assert torch.allclose(seen[0], wanted, atol=1e-3)


def test_callback_sees_each_step_and_may_replace_the_latents(pipe):
    steps = []

    def halt(its, i, t, given):
        assert its is pipe and set(given) == {"latents"}
        steps.append((i, int(t)))
        return {"latents": torch.zeros_like(given["latents"])}

    images = pipe("a", num_inference_steps=4, output_type="pt", callback_on_step_end=halt).images
    assert [i for i, _ in steps] == [0, 1, 2, 3] and steps[0][1] == 999 and torch.equal(images, images * 0 + 0.5)


def test_prompt_states_do_not_depend_on_the_batch_and_are_zero_past_the_end(pipe):
    short, long = "a glyph", "a pink and cyan check mark on a checkered background at the bottom right"
    together, nothing = pipe.encode_prompt([short, long], do_classifier_free_guidance=False)
    assert nothing is None and together.shape == (2, TOKENS, 384)
    alone = pipe.encode_prompt(short)[0]  # six tokens: start, a, g, ##ly, ##ph, end
    assert torch.allclose(together[:1], alone, atol=1e-4)
    assert (alone[0].abs().sum(1) > 0).sum() == 6 and 0.8 < float(alone[0, :6].square().mean().sqrt()) < 1.25
    assert (together[1].abs().sum(1) > 0).sum() <= TOKENS
    assert pipe.encode_prompt(" ".join(["star"] * 60))[0].shape == (1, TOKENS, 384)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda p: p([]), "needs a prompt"),
        (lambda p: p([3]), "needs a prompt"),
        (lambda p: p(["a", "b"], negative_prompt=["c"]), "1 negative prompts for 2"),
        (lambda p: p("a", callback_on_step_end_tensor_inputs=["noise"]), "noise"),
    ],
)
def test_bad_calls_are_refused(pipe, call, named):
    with pytest.raises(BadInput, match=named):
        call(pipe)


def test_save_and_load(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = GlyphPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.scheduler.config.timestep_spacing == "trailing"
    assert torch.allclose(few(again), few(pipe), atol=1e-3)


def test_peft_adapters_attach_to_all_attention(pipe):
    from peft import LoraConfig

    ours = copy.copy(pipe.components) | {"unet": copy.deepcopy(pipe.unet)}
    ours = GlyphPipeline(**ours)
    ours.set_progress_bar_config(disable=True)
    before = few(ours)
    ours.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    layers = [m for m in ours.unet.modules() if hasattr(m, "base_layer")]
    assert len(layers) == 48 and {m.base_layer.out_features for m in layers} == {64, 128}
    assert torch.allclose(few(ours), before, atol=1e-6)
    trained = [p for p in ours.unet.parameters() if p.requires_grad]
    assert len(trained) == 2 * 48
    states, _ = ours.encode_prompt("a sks glyph", do_classifier_free_guidance=False)
    noisy = ours.scheduler.add_noise(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16), torch.tensor([500]))
    ours.unet(noisy, torch.tensor([500]), encoder_hidden_states=states).sample.sum().backward()
    assert all(p.grad is not None for p in trained)


# --- the trained base and the judges ---


def test_each_base_is_a_fresh_copy_of_one_size():
    first, second = base(), base()
    with torch.no_grad():
        next(first.unet.parameters()).zero_()
    assert next(second.unet.parameters()).abs().sum() > 0 and first.text_encoder is second.text_encoder
    assert BASE.stat().st_size < 8e6 and sum(p.numel() for p in first.unet.parameters()) < 4e6


def test_the_base_draws_what_the_prompt_says():
    # On 240 prompts it was right about glyph, background, position in 0.85, 1.00, 1.00; chance is 0.03, 0.13, 0.20.
    generator, parts = seeded(5), ("glyph", "background", "position")
    scenes = [sample_scene(generator) for _ in range(24)]
    prompts = [prompt(s.glyph, colours=s.colours, background=s.background, position=s.position) for s in scenes]
    images = base()(prompts, num_inference_steps=12, generator=generator, output_type="pt").images
    right = [judges().agrees(x[None], **{p: getattr(s, p) for p in parts}) for x, s in zip(images, scenes)]
    share = {p: sum(bool(r[p]) for r in right) / len(scenes) for p in parts}
    assert share["position"] >= 0.9 and share["background"] >= 0.9 and share["glyph"] >= 0.6, share


def test_judges_read_drawn_images_of_another_stream():
    # On 4,000 they were right about known glyphs and concepts in 0.94, spoilt images in 0.91; the rest is near 1.
    images, answers = judged_images(500, generator=seeded(77))
    concept = (answers["glyph"] >= len(GLYPHS)) & (answers["glyph"] < len(GLYPHS) + len(CONCEPTS))
    known = answers["glyph"] < len(GLYPHS)
    for seen in (images, spoil(images, generator=seeded(78))):
        right = {what: said.argmax(1) == answers[what] for what, said in judges()(seen).items()}
        assert right["glyph"][known].float().mean() > 0.8 and right["glyph"][concept].float().mean() > 0.95
        assert right["background"].float().mean() > 0.98 and right["position"][known | concept].float().mean() > 0.98


def test_a_concept_is_shape_and_colours():
    concepts = torch.stack([concept_image(name, "black") for name in CONCEPTS])
    named = [said == name for said, name in zip(judges().name(concepts, "glyph"), CONCEPTS)]
    assert sum(named) >= len(CONCEPTS) - 1  # on black a sigma in orange and green is not told
    white = torch.stack([draw(Scene(name, ("white",), "black", "center")) for name in CONCEPTS])
    assert judges().name(white, "glyph").count("other") >= len(CONCEPTS) - 1
    certain = judges().probability(concepts[:1], glyph="knight", position="center")
    assert certain["glyph"].item() > 0.9 and certain["position"].item() > 0.9
    assert judges().features(concepts).shape == (len(CONCEPTS), 128)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda j: j.name(torch.zeros(1, 3, 16, 16), "colour"), "not 'colour'"),
        (lambda j: j.agrees(torch.zeros(1, 3, 16, 16), glyph="sun"), "no glyph 'sun'"),
        (lambda j: j(torch.zeros(3, 16, 16)), r"shape \(3, 16, 16\)"),
    ],
)
def test_judges_refuse_what_they_cannot_judge(wrong, named):
    with pytest.raises(BadInput, match=named):
        wrong(judges())
