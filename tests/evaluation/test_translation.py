"""Translation metrics on cases with known answers."""

import pytest
import torch
from PIL import Image

from sivae_fast.evaluation.translation import (
    chance,
    draw_translations,
    probe_accuracy,
    shuffled,
    swap_pairs,
)


def test_swap_pairs():
    classes, contents = torch.arange(60) // 10, torch.arange(60) % 10
    among = torch.arange(60) % 3 == 0
    givers, others = swap_pairs(classes, contents, among)
    assert among[givers].all() and among[others].all() and len(givers) > 10
    assert (classes[givers] != classes[others]).all() and (contents[givers] != contents[others]).all()
    assert len(givers.unique()) == len(givers)
    again = swap_pairs(classes, contents, among)
    assert torch.equal(givers, again[0]) and torch.equal(others, again[1])


def test_swap_pairs_of_every_seed_differ_in_both():
    classes, contents = torch.arange(12) // 3, torch.arange(12) % 3  # most draws share one of the two
    drawn = [swap_pairs(classes, contents, torch.ones(12, dtype=torch.bool), seed) for seed in range(5)]
    for givers, others in drawn:
        assert (classes[givers] != classes[others]).all() and (contents[givers] != contents[others]).all()
    assert len({tuple(others.tolist()) for _, others in drawn}) == 5


def test_shuffled_leaves_nothing_in_place():
    for seed in range(5):
        order = shuffled(torch.arange(6), seed)
        assert (order != torch.arange(6)).all() and order.sort().values.tolist() == list(range(6))
        assert shuffled(torch.arange(2), seed).tolist() == [1, 0]
    assert len({tuple(shuffled(torch.arange(6), seed).tolist()) for seed in range(5)}) > 1


def test_probe_finds_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (600,), generator=generator)
    test = torch.arange(600) % 3 == 0
    noise = torch.randn(600, 5, generator=generator)
    told = torch.cat([noise, torch.nn.functional.one_hot(labels, 4) * 100 + 3], 1)
    assert probe_accuracy(told, labels, test) > 0.99
    assert probe_accuracy(noise, labels, test) < 0.4
    assert 0.15 < chance(labels, test) < 0.35


def test_probe_is_trained_on_the_training_rows_alone():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (90,), generator=generator)
    test = torch.arange(90) % 3 == 0
    noise = torch.randn(90, 60, generator=generator)  # as many numbers as rows: it knows every row it saw
    assert probe_accuracy(noise, labels, test) < 0.6
    told = torch.nn.functional.one_hot(labels, 3).double()
    told[0] = 1e6  # far out, in the test rows
    told = torch.cat([told, torch.full((90, 1), 7.0)], 1)  # a code without variation
    with torch.no_grad():
        assert probe_accuracy(told, labels, test) >= 29 / 30


def test_chance_answers_with_the_most_frequent_training_label():
    labels, test = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0]), torch.arange(8) >= 4
    assert chance(labels, test) == 0.25


def test_grid(tmp_path):
    content, classes = torch.zeros(4, 3, 8, 8), torch.ones(2, 3, 8, 8)
    asked = []

    def translate(class_of, content_of):
        asked.append((class_of.mean().item(), content_of.mean().item(), len(class_of)))
        return torch.full_like(content_of, 0.5)

    draw_translations(tmp_path / "grid.png", content, classes, translate)
    assert asked == [(1, 0, 4), (1, 0, 4)]
    picture = Image.open(tmp_path / "grid.png")
    assert picture.width / picture.height == pytest.approx(5 / 3, rel=0.02)
    across, down = picture.width / 5, picture.height / 3
    cells = [
        [picture.convert("L").getpixel((int((x + 0.5) * across), int((y + 0.5) * down))) for x in range(5)]
        for y in range(3)
    ]
    assert cells == [[255, 0, 0, 0, 0], [255, 128, 128, 128, 128], [255, 128, 128, 128, 128]]
