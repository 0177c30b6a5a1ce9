import pytest

from comfy_client.prompt_loras import LoraChoice, split


def test_a_prompt_without_tags_stays_as_it_is():
    assert split("a  fox ,\n (red:1.2), ") == ("a  fox ,\n (red:1.2), ", [])


def test_tags_leave_the_prompt_in_order_with_their_weights():
    clean, loras = split("a fox <lora:ink:0.8> in snow, <lora:styles/soft light:-1:0.5><lora:plain>")
    assert clean == "a fox in snow"
    assert loras == [
        LoraChoice("ink", 0.8, 0.8),
        LoraChoice("styles/soft light", -1.0, 0.5),
        LoraChoice("plain", 1.0, 1.0),
    ]


def test_a_weight_that_is_no_number_is_told():
    with pytest.raises(ValueError, match=r"'strong' in <lora:ink:strong> is no number"):
        split("a fox <lora:ink:strong>")
