from engine.tokenizer import END, START, sections


def test_ids_are_clips():
    # From OpenAI's published tokenizer: "a photo of a cat" and "hello world!".
    ids = sections(["a photo of a cat", "Hello  WORLD!"], pad=END)
    assert ids[0, 0, :7].tolist() == [START, 320, 1125, 539, 320, 2368, END]
    assert ids[1, 0, :5].tolist() == [START, 3306, 1002, 256, END]


def test_padding_follows_the_encoder():
    assert sections(["cat"], pad=0)[0, 0, 3:].unique().tolist() == [0]
    assert sections(["cat"], pad=END)[0, 0, 3:].unique().tolist() == [END]


def test_a_short_word_moves_to_the_next_section_whole():
    # Seventy-four one-token words, then one of three tokens: it does not fit into the 75th place.
    ids = sections(["cat " * 74 + "qwxzkvjq"], pad=END)
    assert ids.shape == (1, 2, 77)
    assert ids[0, 0, 75].item() == END
    assert ids[0, 1, 1].item() != END


def test_a_long_word_is_split():
    ids = sections(["cat " * 74 + "q1w2e3r4t5y6u7i8o9p0"], pad=END)
    assert ids[0, 0, 75].item() != END
    assert ids[0, 0, 76].item() == END


def test_shorter_texts_get_empty_sections():
    ids = sections(["cat", "cat " * 160], pad=END)
    assert ids.shape == (2, 3, 77)
    assert ids[0, 1].tolist() == [START] + [END] * 76
