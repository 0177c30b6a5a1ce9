"""`<lora:...>` as other programs and their extensions write it."""

import pytest

from comfy_client.prompt_loras import LoraChoice, split


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:foo:1:1:lbw=IN02>", LoraChoice("foo", 1.0, 1.0, ("lbw=IN02",))),
        ("<lora:foo:0.5:lbw=OUTALL:stop=20>", LoraChoice("foo", 0.5, 0.5, ("lbw=OUTALL", "stop=20"))),
        ("<lora:foo:0.5:MIDD>", LoraChoice("foo", 0.5, 0.5, ("MIDD",))),
        ("<lora:foo:1:0,0,0,1,1,1>", LoraChoice("foo", 1.0, 1.0, ("0,0,0,1,1,1",))),
        ("<lora:foo:1:0.5:8>", LoraChoice("foo", 1.0, 0.5, ("8",))),
        ("<lora:foo:te=0.4:unet=0.6:dyn=8>", LoraChoice("foo", 0.6, 0.4, ("dyn=8",))),
        ("<lora:foo::0.5>", LoraChoice("foo", 1.0, 0.5)),
        ("<lyco:foo:0.3>", LoraChoice("foo", 0.3, 0.3)),
        ("<lora: 水墨 style v1.2 : 0.3 >", LoraChoice("水墨 style v1.2", 0.3, 0.3)),
    ],
)
def test_every_form_leaves_the_prompt_and_what_is_not_supported_is_named(tag, expected):
    assert split(f"a fox {tag}, in snow") == ("a fox , in snow", [expected])


def test_a_weight_that_is_not_finite_is_refused_by_its_tag():
    with pytest.raises(ValueError, match="'nan' in <lora:foo:nan> is no number"):
        split("<lora:foo:nan>")
