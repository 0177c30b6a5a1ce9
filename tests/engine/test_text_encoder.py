import pytest
import torch

from engine import tokenizer
from engine.text_encoder import TextEncoder
from luna_protocol.errors import Impossible
from tests import reference
from tests.engine.conftest import CPU

ENCODERS = [("tiny_sd15", "clip_l"), ("tiny_sdxl", "clip_l"), ("tiny_sdxl", "clip_g")]


@pytest.fixture(params=ENCODERS, ids=lambda p: "-".join(p))
def pair(request, tiny):
    shape, name = request.param
    path, parts = tiny(shape)
    encoder = TextEncoder.load(path, parts["clip"], name, torch.float32, CPU)
    return encoder, reference.text_encoder(path, shape, name)


TOKENS = tokenizer.sections(["a red circle on blue", "word " * 100], pad=tokenizer.END).flatten(0, 1)


def test_last_layer_and_pooled_equal_transformers(pair):
    ours, theirs = pair
    hidden, pooled = ours.encode(TOKENS)
    expected = theirs(TOKENS, output_hidden_states=True)
    assert torch.equal(hidden, expected.last_hidden_state)
    assert torch.equal(pooled, expected.text_embeds)


def test_penultimate_layer_equals_transformers(pair):
    ours, theirs = pair
    expected = theirs(TOKENS, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(ours.encode(TOKENS, layer=-2, final_norm=False)[0], expected)
    normed = theirs.text_model.final_layer_norm(expected)
    assert torch.equal(ours.encode(TOKENS, layer=-2)[0], normed)


def test_layer_minus_one_with_norm_is_the_last(pair):
    ours, _ = pair
    assert torch.equal(ours.encode(TOKENS, layer=-1)[0], ours.encode(TOKENS)[0])


def test_vectors_stand_in_for_tokens(pair):
    """A vector equal to a token's own embedding changes nothing; another one does, from its column on."""
    ours, _ = pair
    table = ours.model.embeddings.token_embedding.weight
    places = torch.tensor([[0, 2], [1, 3]])
    same = table[TOKENS[places[:, 0], places[:, 1]]]
    plain = ours.encode(TOKENS)[0]
    assert torch.equal(ours.encode(TOKENS, (same, places))[0], plain)
    other = ours.encode(TOKENS, (same + 1, places))[0]
    assert torch.equal(other[0, :2], plain[0, :2])
    assert not torch.equal(other[0, 2], plain[0, 2])
    assert torch.equal(other[2:], plain[2:])


def test_nothing_of_a_vector_stays(pair):
    ours, _ = pair
    before = ours.encode(TOKENS)[0]
    ours.encode(TOKENS, (torch.ones(1, ours.width), torch.tensor([[0, 1]])))
    assert torch.equal(ours.encode(TOKENS)[0], before)


def test_without_an_end_token_the_last_position_pools(pair):
    ours, _ = pair
    tokens = TOKENS[:1, :7].clone()
    tokens[tokens == tokenizer.END] = 5
    hidden, pooled = ours.encode(tokens, projected=False)
    assert torch.equal(pooled, hidden[:, -1])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokens": torch.full((1, 77), 60000)}, "60000"),
        ({"tokens": torch.full((1, 77), -1)}, "-1"),
        ({"tokens": torch.zeros(1, 78, dtype=torch.int64)}, "78"),
        ({"layer": -3}, "layer -3"),
        ({"vectors": (torch.zeros(1, 7), torch.zeros(1, 2, dtype=torch.int64))}, "embeddings have shape"),
        ({"vectors": (torch.zeros(1, 64), torch.tensor([[0, 77]]))}, "outside the tokens"),
        ({"vectors": (torch.zeros(1, 64), torch.zeros(2, 2, dtype=torch.int64))}, "embedding_positions"),
    ],
)
def test_bad_input_is_named(tiny, change, told):
    path, parts = tiny("tiny_sd15")
    encoder = TextEncoder.load(path, parts["clip"], "clip_l", torch.float32, CPU)
    with pytest.raises(Impossible, match=told):
        encoder.check(**{"tokens": TOKENS, "vectors": None, "layer": None, **change})
