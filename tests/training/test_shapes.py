import numpy as np
import pytest

from training import measure, shapes, text


def scenes(count, **kind):
    rng = np.random.default_rng(5)
    return [shapes.random_scene(rng, **kind) for _ in range(count)]


@pytest.mark.parametrize("held_out", [False, True])
def test_scenes_keep_to_their_side_of_the_split(held_out):
    found = {
        shapes.is_held_out(thing.shape, thing.colour, scene.background)
        for scene in scenes(500, held_out=held_out)
        for thing in scene.things
    }
    assert found == {held_out}


def test_captions_say_what_is_drawn():
    for scene in scenes(200):
        for thing in scene.things:
            assert f"{thing.colour} {thing.shape}" in scene.caption
        assert f"{scene.background} background" in scene.caption
        assert " a orange" not in f" {scene.caption}"


def test_things_stay_inside_the_picture():
    for scene in scenes(300):
        for thing in scene.things:
            assert min(thing.x, thing.y) > thing.radius
            assert max(thing.x, thing.y) < shapes.SIZE - thing.radius


def test_measure_recognises_every_drawn_thing():
    for scene in scenes(150, pairs=0):
        thing = scene.things[0]
        assert measure.look(shapes.draw(scene)) == (thing.shape, thing.colour, scene.background)


def test_measure_sees_that_nothing_is_there():
    empty = shapes.paint([], shapes.BACKGROUNDS["pink"])
    assert measure.look(empty) == ("", "", "pink")


def test_measure_is_not_taken_in_by_noise():
    rng = np.random.default_rng(1)
    wanted = [(s.things[0].shape, s.things[0].colour, s.background) for s in scenes(60, pairs=0)]
    seen = [measure.look(rng.random((shapes.SIZE, shapes.SIZE, 3))) for _ in wanted]
    assert (np.array(seen) == np.array(wanted)).mean() < 0.35


@pytest.mark.parametrize("style", shapes.STYLES[1:])
def test_styles_change_the_picture(style):
    star = [(shapes.Thing("star", "red", 64, 64, 40), shapes.COLOURS["red"])]
    plain, styled = (shapes.paint(star, shapes.BACKGROUNDS["blue"], name) for name in ("plain", style))
    assert np.abs(styled - plain).mean() > 0.02


def test_captions_fit_clip_s_vocabulary_word_by_word():
    ids = text.tokenize(["a red circle on a blue background", ""])
    assert ids[0, :10].tolist() == [49406, 320, 736, 7117, 525, 320, 1746, 5994, 49407, 49407]
    assert ids[1].tolist() == [49406] + [49407] * 76
